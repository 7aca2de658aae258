"""An exported .safetensors from elsewhere: its header and tensors are checked before anything is made of them."""

import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import make_run

import fastssl
from fastssl.common.errors import UserError
from fastssl.export import export_run


@pytest.fixture
def exported(tmp_path):
    run, _, _ = make_run(tmp_path / "run", {"train": "x.beton"}, embedding={"stochastic": "z"})
    return export_run(run, "safetensors", tmp_path / "good.safetensors", sigma=True).path


def refusals(path):
    for load in (fastssl.load_model, fastssl.load_encoder):
        with pytest.raises(UserError) as error:
            load(path)
        sentence = str(error.value)
        assert "\n" not in sentence and len(sentence) < 600 and str(path) in sentence
        yield sentence


def with_header(path, out, change):
    """A copy whose header is changed, byte for byte as an attacker would write it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    out.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return out


NAME = "encoder.conv1.0.weight"


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "X1", "BOOL", "C64", "U64", 3, None])
def test_tensors_of_other_types(exported, tmp_path, dtype):
    path = with_header(exported, tmp_path / "x.safetensors", lambda header: header[NAME].update(dtype=dtype))
    assert len(list(refusals(path))) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[NAME].update(shape=[10**18, 10**18]),
        lambda header: header[NAME].update(shape=[-1]),
        lambda header: header[NAME].update(data_offsets=[0, 10**15]),
        lambda header: header[NAME].update(data_offsets=[10, 0]),
        lambda header: header[NAME].update(shape="x"),
        lambda header: header.update({NAME: 3}),
        lambda header: header.update(__metadata__=3),
        lambda header: header.update(__metadata__={"recipe": 3}),
        lambda header: header["__metadata__"].update(recipe="[" * 10**5),
        lambda header: header["__metadata__"].update(recipe="9" * 10**5),
        lambda header: header["__metadata__"].update(recipe=json.dumps({"name": "\x1b[2J" * 10**4})),
        lambda header: header["__metadata__"].update(recipe="{}"),
    ],
)
def test_headers_of_other_shapes(exported, tmp_path, change):
    assert len(list(refusals(with_header(exported, tmp_path / "x.safetensors", change)))) == 2


def test_complex_weights_are_refused_and_not_cut(exported, tmp_path, recwarn):
    with safe_open(exported, "pt") as file:
        header, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    weights[NAME] = weights[NAME].to(torch.complex64)
    save_file(weights, tmp_path / "x.safetensors", metadata=header)
    assert all(
        "a tensor of a kind that no weights have" in sentence for sentence in refusals(tmp_path / "x.safetensors")
    )
    assert not recwarn.list


def test_pipes_devices_and_sparse_files_do_not_hang(exported, tmp_path):
    fifo, link, sparse = (tmp_path / f"{name}.safetensors" for name in ("fifo", "link", "sparse"))
    os.mkfifo(fifo)
    link.symlink_to("/dev/zero")
    with open(sparse, "wb") as file:
        file.write(exported.read_bytes()[:100])
        file.truncate(1 << 40)
    for path in (fifo, link, sparse):
        assert all("is not a readable safetensors file" in sentence for sentence in refusals(path))
