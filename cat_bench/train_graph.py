"""A training step as CUDA graphs: each of its parts captured once, then replayed in their order.

A step whose layers are not compiled is thousands of kernels, and launching them from Python may
take longer than running them. Replayed, a part is one launch, so the GPU alone sets its time.

All graphs of a step share one pool of memory, through which one part hands the next what it leaves
(activations, the loss, gradients), and which a later part may write over. So they are replayed one
after the other, never one of them alone.
"""

import gc
from collections.abc import Callable, Mapping

import torch

from cat_bench.errors import UserError
from cat_bench.graph import capture_stream
from cat_bench.profiler import is_out_of_memory

WARMUPS = 3  # PyTorch's notes on CUDA graphs


def captured(
    step: Callable[[], object], parts: Mapping[str, Callable[[], object]]
) -> list[torch.cuda.CUDAGraph]:
    """A graph per part. `step()` runs all parts from Python and leaves no gradients behind; it is
    called WARMUPS times, so it compiles, tunes and trains. Capturing itself computes nothing.

    What a part leaves in Python (a loss, `p.grad`) is memory of the pool: every replay writes it
    anew. Raises UserError where a part waits for the GPU, which a graph cannot do.
    """
    gc.collect()  # what autograd left in cycles keeps memory, and is tied to the stream of then
    torch.cuda.empty_cache()  # what this stream has kept, no other one can use
    graphs = {name: torch.cuda.CUDAGraph() for name in parts}
    pool = torch.cuda.graph_pool_handle()
    side = capture_stream(torch.device("cuda", torch.cuda.current_device()))
    side.wait_stream(torch.cuda.current_stream())
    # One stream for warm-ups and captures: the backward pass runs where its forward pass ran, and
    # cuBLAS has a workspace per stream, which must exist before it is captured.
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            step()
        gc.collect()
        for name, part in parts.items():
            try:
                with torch.cuda.graph(graphs[name], pool=pool, stream=side):
                    part()
            except RuntimeError as error:
                raise explained(error, name) from error
    torch.cuda.current_stream().wait_stream(side)
    return list(graphs.values())


def explained(error: BaseException, part: str) -> BaseException:
    """What has broken the capture of `part`: the first error of the chain, since a broken capture
    fails to end, too. In words where it is lack of memory, or something that CUDA cannot capture.
    """
    while error.__context__ is not None:
        error = error.__context__
    if is_out_of_memory(error):
        return torch.OutOfMemoryError(
            f"{error}\nIt was short while the step was captured; --step-path eager may fit."
        )
    if "captur" in str(error):
        return UserError(
            f"the {part} part of this training step cannot be captured as a CUDA graph: "
            f"{str(error).splitlines()[0]}",
            "A captured step never waits for the GPU (`.item()`, an `if` on a tensor, a copy "
            "from the host). Use --step-path eager to launch it from Python.",
        )
    return error
