"""The core of `osora`: everything but words on a screen. See CONTRIBUTING.md for the rooms and their layers."""

__version__ = "0.1.0"
