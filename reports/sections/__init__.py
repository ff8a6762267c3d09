"""The sections of a report, one module per topic: each turns data into tables and pictures."""
