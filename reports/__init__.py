"""Reports on plans, runs, benchmarks and experiments, and the calculator page.

`builder` collects the sections of a report; `inputs` reads files, `sections` turns them into tables and pictures, and
`render` writes the document as HTML, Markdown and SVG. `calculator` is the web page of ``translution serve``.
"""
