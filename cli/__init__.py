"""The ``translution`` command."""
def main():
    import sys
    from pathlib import Path
    from translution.distributed.train import train
    a=[x for x in sys.argv[1:] if not x.startswith('--local_rank')]
    train(Path(a[1]),Path(a[2]))
