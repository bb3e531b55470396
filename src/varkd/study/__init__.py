"""`varkd study`: methods x backbones x seeds under one budget, resumable, ending in results.json and a page."""
