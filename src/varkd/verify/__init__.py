"""Golden files against our modules: `python -m varkd.verify FILE.safetensors ...`."""

from varkd.verify.check import verify as verify
