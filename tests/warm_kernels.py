"Compile the kernels for a GPU that is not here; print the shared memory they take."

import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
import las_nb.fast.fused as fused


class Absent:
    "What Triton asks of a GPU before it launches a kernel."

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


class Warm:
    "A kernel that is compiled where it would run."

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*args, **kw):
            made = self.kernel.warmup(*args, grid=grid, **kw)
            print(f"{self.kernel.__name__}-{DTYPE} {made.metadata.shared}")

        return run


driver.set_active(Absent())
for name in "smooth_rows survey reach forward backward_queries backward_keys".split():
    setattr(fused, f"_{name}", Warm(getattr(fused, f"_{name}")))
for dtype in (torch.bfloat16, torch.float32):
    DTYPE = str(dtype)[6:]
    q, k, v = torch.randn(3, 1, 2, 300, 64, dtype=dtype).requires_grad_()
    k = fused.smooth_rows(k, (0.0, 0.5), 3)
    o, _ = fused.fused_attention(q, k, v, (0.0, 0.5), 1e-3)
    torch.autograd.grad(o.sum(), (q, k, v))
