"""The version, for the package and for a checkout that was never installed."""

VERSION = "0.1.0"
