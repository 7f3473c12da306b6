"""Sessions of the Atlas runtime as rows: from its database or from an export of it.

The way of a session: postgres → records → parser → schema, or files → parser → schema; then `query`
says which are wanted and `sessions` what of them trains. `snapshot` keeps what a run has read.
Of a run only `data.sources` imports this package, and only where the config asks for sessions.
"""
