"""The version of this package, which its parts may ask for without the package itself."""

__version__ = "0.1.0"
