"""Charts that sections and pages share: memory over a step, and the course of training runs."""

__all__: list[str] = []
