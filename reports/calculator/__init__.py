"""The calculator page and its server."""
