from .node_report import compile_on_node as compile_on_node
from .node_report import report_node as report_node
from .runner import compile_plan_ops as compile_plan_ops
from .runner import preflight as preflight
