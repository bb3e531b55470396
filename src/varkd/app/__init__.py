"""`varkd app`: models side by side in a browser. `playground` computes, `page` is the only file that knows Gradio."""
