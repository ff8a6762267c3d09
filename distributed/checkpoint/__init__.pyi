from .exporter import ExportedFile as ExportedFile
from .exporter import export as export
from .integrity import verify_checkpoint as verify_checkpoint
from .manifest import run_checkpoints as run_checkpoints
from .weights import WrittenNetwork as WrittenNetwork
from .weights import export_published as export_published
from .weights import import_published as import_published
