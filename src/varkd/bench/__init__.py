"""Loss, rollouts and training steps against other code and against the machine's bounds; `varkd bench` runs them."""
