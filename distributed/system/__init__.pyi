from .compiled_ops import prepare_ops as prepare_ops
from .compiled_ops import remove_stale_locks as remove_stale_locks
from .environment import free_port as free_port
from .environment import launch_environment as launch_environment
from .environment import own_path as own_path
from .nvme_swap import io_handle as io_handle
