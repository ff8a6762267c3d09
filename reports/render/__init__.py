"""The document model of a report, and its renderers: HTML, Markdown, PNG and SVG."""

__all__: list[str] = []
