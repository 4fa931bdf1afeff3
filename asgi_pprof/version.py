"""The version, which the build reads without importing the package."""

VERSION = "0.1.0"
