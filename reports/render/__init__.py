"""Documents as HTML, Markdown and pictures."""
