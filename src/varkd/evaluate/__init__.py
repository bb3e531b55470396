"""What samples, models and machines are measured by; each file returns numbers, none draws or decides."""
