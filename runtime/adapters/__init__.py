"""Low-rank adapters beside an artifact: read as PEFT writes them, bound to a program's linears."""
