"""Published folders: model, tokenizer, a pipeline that runs without varkd, and a card made of a run's files."""
