"""What users call first, in the order in which they meet it: module, name, and an example
that runs as it stands (`tests/test_docs.py` runs each). The reference opens with them."""

FIRST = {
    ("fast.api", "las_attention"): """
import torch
from las_nb import decay_rates, las_attention

q, k, v = torch.randn(3, 2, 8, 100, 16)  # batch, heads, length, width of a head
rates = decay_rates(n_heads=8, max_rate=0.1)
o = las_attention(q, k, v, rates, window=3)  # (2, 8, 100, 16), causal
""",
    ("locality", "decay_rates"): """
from las_nb import decay_rates

rates = decay_rates(n_heads=4, max_rate=0.3)  # (4,), 0 for the first head
""",
    ("mixers.las", "LaSAttention"): """
import torch
from las_nb import LaSAttention

layer = LaSAttention(dim=64, n_heads=4, max_rate=0.1, window=3)
y = layer(torch.randn(2, 100, 64))  # (2, 100, 64), in place of self-attention
""",
    ("model", "LaSTransformer"): """
import torch
from las_nb import LaSTransformer

model = LaSTransformer(n_classes=10, dim=64, depth=2, n_heads=4, vocab=256)
tokens, lengths = torch.randint(256, (2, 100)), torch.tensor([100, 60])
logits = model(tokens, lengths=lengths)  # (2, 10)
""",
    ("adapt", "register_las"): """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from las_nb import register_las

register_las(max_rate=0.1, window=3)  # an attention called "las"
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
config = LlamaConfig(
    vocab_size=50, num_hidden_layers=2, attn_implementation="las", **sizes
)
logits = LlamaForCausalLM(config)(torch.randint(50, (1, 20))).logits  # (1, 20, 50)
""",
    ("fast.state", "las_state"): """
import torch
from las_nb import decay_rates, las_state

q, k, v = torch.randn(3, 1, 8, 300, 16)  # one stream of 300 tokens
rates = decay_rates(n_heads=8, max_rate=0.5)
state = las_state(batch=1, rates=rates, width=16, tol=1e-3, score_bound=16.0)
o = state.step(q[:, :, :200], k[:, :, :200], v[:, :, :200])  # a prompt
for i in range(200, 300):  # then token by token; decaying heads forget
    o = state.step(*(x[:, :, i : i + 1] for x in (q, k, v)))  # (1, 8, 1, 16)
""",
    ("train.loop", "train"): """
from las_nb.train import train

# as `las train digits --limit 100 --epochs 1 --dim 16 --depth 1 --out runs/tiny`
record = train("digits", out="runs/tiny", limit=100, epochs=1, dim=16, depth=1)
record["test"]  # percent of the test digits
""",
    ("mixers.register", "register_mixer"): """
import torch
from las_nb import LaSTransformer, register_mixer

register_mixer("identity", lambda dim, **options: torch.nn.Identity())
sizes = dict(n_classes=2, dim=16, depth=1, in_features=1)
model = LaSTransformer(mixer="identity", **sizes)
""",
    ("tasks.task", "register_task"): """
import torch
from las_nb.tasks import Batch, Task, register_task


def coins(root=None, seed=0, **options):
    "What comes up: 32 throws, and whether the last one was heads."
    throws = torch.randint(2, (300, 32), generator=torch.Generator().manual_seed(seed))
    parts = dict(zip(("train", "valid", "test"), throws.split(100)))
    return {name: Batch(x, None, x[:, -1]) for name, x in parts.items()}


register_task("coins", Task(coins, 2, vocab=2, max_len=32))  # las train coins
""",
}
