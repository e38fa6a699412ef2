"""A checkpoint as a training of several ranks saves it: by torch's own writers, which NeMo Automodel builds on.

    python -m tests.sharded CHECKPOINT DIRECTORY

Six ranks: three that share the rows of every tensor and, of the matrices, two that share the columns. They are forked
from one process, so torch is imported once. Beside their shards stand `consolidated`, which torch makes of them, and
`pickles`, the same tensors in DCP's other format.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MESH = (3, 2)
N_FILES = 2
ROOT = Path(__file__).parents[1]


def write(checkpoint: Path, directory: Path) -> Path:
    """In a process of its own: gloo's threads do not end with the group."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.sharded", str(checkpoint), str(directory)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    return directory


def _save(checkpoint: Path, directory: Path) -> None:
    import torch.distributed.checkpoint as dcp
    import torch.multiprocessing as multiprocessing
    from safetensors import safe_open
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    tensors: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    metadata = directory / ".hf_metadata"
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(checkpoint, metadata, ignore=ignored, dirs_exist_ok=True)
    in_file = {name: 1 + (i >= len(tensors) // 2) for i, name in enumerate(tensors)}
    (metadata / "fqn_to_file_index_mapping.json").write_text(json.dumps(in_file), "utf-8")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (tensors, in_file, directory, f"file://{folder}/ranks")
        multiprocessing.start_processes(_rank, arguments, MESH[0] * MESH[1], start_method="fork")
    consolidated = directory / "consolidated"
    shutil.copytree(metadata, consolidated, ignore=shutil.ignore_patterns("fqn_*"))
    consolidate_safetensors_files(str(directory), str(consolidated), in_file)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(directory / "pickles"), no_dist=True)


def _rank(rank: int, tensors: dict[str, Any], in_file: dict[str, int], directory: Path, meeting_place: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting_place, rank=rank, world_size=MESH[0] * MESH[1])
    mesh = init_device_mesh("cpu", MESH)
    state = {}
    for name, tensor in tensors.items():
        rows: Placement = Shard(0) if tensor.dim() else Replicate()
        columns: Placement = Shard(1) if tensor.dim() == 2 else Replicate()
        state[name] = distribute_tensor(tensor, mesh, [rows, columns], src_data_rank=None)
    writer = checkpoint.HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=in_file, save_distributed=True)
    checkpoint.save(state, storage_writer=writer)
    dist.destroy_process_group()


if __name__ == "__main__":
    _save(Path(sys.argv[1]), Path(sys.argv[2]))
