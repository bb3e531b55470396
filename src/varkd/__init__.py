"""varkd: compress visual autoregressive models by distillation."""
