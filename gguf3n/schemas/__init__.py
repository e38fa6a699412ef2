"""What `--json` prints, as types, and the JSON Schemas that are made of them.

outputs.py      a dataclass for each `gguf3n.X/1`; parts of it are the dataclasses of the code itself
generate.py     a JSON Schema from a dataclass
gguf3n.X.1.json the schemas; scripts/make_schemas.py writes them
"""
