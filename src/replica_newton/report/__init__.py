"""What a person looks at: figures, the HTML report, the terminal table and the live progress.

The modules are imported one by one, so that the progress display does not load matplotlib:
`summary` (runs grouped and compared), `style`, `figures`, `html`, `tables` and `progress`.
"""
