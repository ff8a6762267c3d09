from .exporter import ExportedFile as ExportedFile
from .exporter import export as export
from .weights import WrittenNetwork as WrittenNetwork
from .weights import export_published as export_published
from .weights import import_published as import_published
