"""Reports on plans, runs, benchmarks and experiments, and the calculator page.

`builder` collects the sections of a report; `inputs` reads files, `sections` turns them into tables and pictures, and
`render` writes the document as HTML, Markdown and SVG. `calculator` is the web page of ``translution serve``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
