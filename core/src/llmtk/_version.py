"""The core's version where no distribution is installed, as when it runs from a source tree."""

SOURCE_VERSION = "0.1.0"
