"""The version, in one place; read by the build without importing the package."""

VERSION = "0.1.0"
