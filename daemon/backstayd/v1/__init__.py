"""Generated from proto/backstayd/v1 by `make proto`. Nothing outside ``backstayd.transport`` imports it."""
