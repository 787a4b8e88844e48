"""nanoGPT's training step beside ours, in a separate process, since its torch and our jax share no interpreter.

None of its code is copied: a checkout of github.com/karpathy/nanoGPT is named, and its ``model.py`` is imported there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

from xattn.errors import BadInput

# A step of its train.py: draw and copy the batch, forward, backward, clip, AdamW, zero_grad, read the loss. On a GPU
# it runs in bfloat16 and compiled, as its train.py does by default.
_STEPS = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from model import GPT, GPTConfig
s = json.loads(sys.argv[2])
torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
device = "cuda" if torch.cuda.is_available() else "cpu"
stdout, sys.stdout = sys.stdout, sys.stderr
length, batch = s["context_length"], s["batch_size"]
model = GPT(GPTConfig(block_size=length, vocab_size=s["vocab_size"], n_layer=s["num_layers"], n_head=s["num_heads"],
                      n_embd=s["embedding_dim"], dropout=0.0, bias=False)).to(device)
optimizer = model.configure_optimizers(1e-3, 0.1, (0.9, 0.95), device)
parameters = sum(p.numel() for p in model.parameters())
if device == "cuda":
    model = torch.compile(model)
data = torch.randint(s["vocab_size"], (1_000_000,))

def step():
    starts = torch.randint(len(data) - length, (batch,))
    x = torch.stack([data[i:i + length] for i in starts]).to(device)
    y = torch.stack([data[i + 1:i + 1 + length] for i in starts]).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        _, loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()

for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "torch": torch.__version__, "num_params": parameters}), file=stdout,
          flush=True)
"""


class Peer:
    """The process. ``settings``: num_layers, num_heads, embedding_dim, context_length, batch_size, vocab_size.

    Raises :class:`BadInput` if the folder has no model.py, or the interpreter does not run it.
    """

    def __init__(self, checkout: Path, python: str, settings: dict[str, int]):
        if not (checkout / "model.py").is_file():
            raise BadInput(f"--peer {checkout}: not a checkout of nanoGPT, it has no model.py")
        command = [python, "-c", _STEPS, str(checkout), json.dumps(settings)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise BadInput(f"--peer-python {python}: {error.strerror}") from error
        self._python = python
        self.facts: dict[str, Any] = {}

    def steps(self, number: int) -> list[float]:
        """Run this number of steps; return the seconds of each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, as the missing answer shows
        answer = self._process.stdout.readline()
        if not answer:
            raise BadInput(f"--peer-python {self._python}: nanoGPT's step does not run there; its output is above")
        self.facts = json.loads(answer)
        seconds: list[float] = self.facts.pop("seconds")
        return seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)
