"""Train image generators from captioned images at any size."""

__version__ = "0.2.0"
