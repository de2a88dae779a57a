"""What every benchmark shares: `fastssl/record.py`, under the name that the benchmarks import."""

from fastssl.record import Row, Value, append_rows, command_line, environment_columns, format_table, spread

__all__ = ["Row", "Value", "append_rows", "command_line", "environment_columns", "format_table", "spread"]
