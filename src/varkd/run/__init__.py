"""From a resolved `Run` to objects to the loop: the one place that knows everything."""
