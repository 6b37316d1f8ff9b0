"""PyTorch model of a decoder whose blocks differ from layer to layer, as kd_jax exports it.

A GPT-2, Phi, Llama or Qwen2 some of whose blocks have fewer heads and FFN columns than the others
(slim), or work in a narrower width between two projections (bottleneck). `blocks` of config.json
has the sizes of each layer, `base_model_type` says which family; all other keys and the names of
the tensors are that family's own. It needs torch and transformers alone (4.57 and 5 were tried):

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Attention is torch's scaled_dot_product_attention, whatever `attn_implementation` says.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.pytorch_utils import Conv1D

# transformers 5.24 calls past_key_values cache. Either is taken; outputs have the one it looks for.
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"


def known(arguments, *names):
    """The further arguments that are read; others are refused unless None or False."""
    odd = [k for k, v in arguments.items() if k not in names and v is not None and v is not False]
    if odd:
        raise TypeError(f"this model has no use for {', '.join(odd)}; leave that out")
    return {name: arguments[name] for name in names if name in arguments}


class KDJaxConfig(PretrainedConfig):
    """The family's own keys, `base_model_type` and `blocks`."""

    model_type = "kd_jax_decoder"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    # Ties have a default of our own, so that transformers 4 writes them down in either case.
    def __init__(self, base_model_type="gpt2", blocks=(), tie_word_embeddings=False, **kwargs):
        self.base_model_type = base_model_type
        self.blocks = list(blocks)
        if base_model_type == "gpt2":
            # Under their common names too, by which transformers looks for them.
            kwargs.setdefault("hidden_size", kwargs.get("n_embd"))
            kwargs.setdefault("num_attention_heads", kwargs.get("n_head"))
            kwargs.setdefault("num_hidden_layers", kwargs.get("n_layer"))
            kwargs.setdefault("max_position_embeddings", kwargs.get("n_positions"))
        else:  # transformers 5 gathers all that concerns rotation, and looks at the length for that
            self.rope_parameters = None
            self.max_position_embeddings = kwargs.get("max_position_embeddings")
        # kd_jax exports no model of which a layer would see less than all tokens, but Qwen2's files
        # name a window that is off, and caches would heed it.
        for name in ("sliding_window", "use_sliding_window", "layer_types"):
            kwargs.pop(name, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Rotation:
    """Rotary positions for heads of one width, stretched as transformers stretches them."""

    def __init__(self, config, head_width):
        self.config = copy.copy(config)
        self.config.head_dim = head_width
        given = getattr(config, "rope_parameters", None) or {}
        given = given or getattr(config, "rope_scaling", None) or {}
        self.kind = given.get("rope_type", given.get("type", "default"))
        self.theta = given.get("rope_theta", getattr(config, "rope_theta", None)) or 10000.0
        part = given.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
        self.width = int(head_width * (1.0 if part is None else part))

    def table(self, positions, dtype):
        """Cosines and sines at positions (B, T), each (B, 1, T, width)."""
        size = 1.0
        if self.kind == "default":
            pairs = torch.arange(0, self.width, 2, device=positions.device).float()
            steps = 1.0 / self.theta ** (pairs / self.width)
        else:
            longest = int(positions.max()) + 1
            make = ROPE_INIT_FUNCTIONS[self.kind]
            steps, size = make(self.config, positions.device, seq_len=longest)
        angles = positions[:, None, :, None].float() * torch.cat([steps, steps])
        return (angles.cos() * size).to(dtype), (angles.sin() * size).to(dtype)


def rotate(x, table):
    """Heads (B, H, T, K), their first features turned as two halves."""
    cos, sin = table
    part, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    one, two = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat([-two, one], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


class Attention(nn.Module):
    """Heads, their rotation and the cache; subclasses project."""

    def __init__(self, config, shape, layer):
        super().__init__()
        self.layer = layer
        self.head_width = shape["head_width"]
        self.split = [
            shape[name] * self.head_width for name in ("num_heads", "num_kv_heads", "num_kv_heads")
        ]
        self.groups = shape["num_heads"] // shape["num_kv_heads"]
        self.scale = self.head_width**-0.5
        self.rate = getattr(config, "attention_dropout", 0.0)

    def forward(self, x, mask, tables, cache, slots):
        heads = (*x.shape[:2], -1, self.head_width)
        q, k, v = (each.view(heads).transpose(1, 2) for each in self.project(x))
        if tables:
            q, k = (rotate(each, tables[self.head_width]) for each in (q, k))
        if cache is not None:
            # Static caches of transformers 4 have to be told where.
            k, v = cache.update(k, v, self.layer, {"cache_position": slots})
            k, v = (each[:, :, : mask.shape[-1]] for each in (k, v))  # a static cache has more
        k, v = (each.repeat_interleave(self.groups, dim=1) for each in (k, v))
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, rate, scale=self.scale)
        return self.output(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class GPT2Attention(Attention):
    def __init__(self, config, shape, layer):
        super().__init__(config, shape, layer)
        self.c_attn = Conv1D(sum(self.split), shape["width"])
        self.c_proj = Conv1D(shape["width"], self.split[0])
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.rate = config.attn_pdrop
        if not config.scale_attn_weights:
            self.scale = 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def project(self, x):
        return self.c_attn(x).split(self.split, dim=-1)

    def output(self, y):
        return self.dropout(self.c_proj(y))


class SeparateAttention(Attention):
    """Three projections; `into` and `out` say which have biases."""

    def __init__(self, config, shape, layer, into, out, name="o_proj"):
        super().__init__(config, shape, layer)
        width = shape["width"]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, n, into) for n in self.split)
        self.out = name
        self.add_module(name, nn.Linear(self.split[0], width, out))

    def project(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def output(self, y):
        return getattr(self, self.out)(y)


def sized(config, shape):
    """The config of a model as wide as one block, for layers that transformers has."""
    copied = copy.copy(config)
    copied.hidden_size, copied.intermediate_size = shape["width"], shape["ffn_width"]
    return copied


class GPT2Block(nn.Module):
    def __init__(self, config, shape, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape["width"], config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, shape, layer)
        self.ln_2 = nn.LayerNorm(shape["width"], config.layer_norm_epsilon)
        self.mlp = GPT2MLP(shape["ffn_width"], sized(config, shape))

    def forward(self, x, **scope):
        x = x + self.attn(self.ln_1(x), **scope)
        return x + self.mlp(self.ln_2(x))


class PhiBlock(nn.Module):
    """Attention and MLP read the same normalised input."""

    def __init__(self, config, shape, layer):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape["width"], config.layer_norm_eps)
        self.self_attn = SeparateAttention(config, shape, layer, True, True, "dense")
        self.mlp = PhiMLP(sized(config, shape))
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, **scope):
        y = self.input_layernorm(x)
        attended = self.dropout(self.self_attn(y, **scope))
        return x + attended + self.dropout(self.mlp(y))


class LlamaBlock(nn.Module):
    """Llama's, and Qwen2's, whose projections have biases where they read."""

    def __init__(self, config, shape, layer):
        super().__init__()
        qwen2 = config.base_model_type == "qwen2"
        into, out = (True, False) if qwen2 else (getattr(config, "attention_bias", False),) * 2
        self.input_layernorm = LlamaRMSNorm(shape["width"], config.rms_norm_eps)
        self.self_attn = SeparateAttention(config, shape, layer, into, out)
        self.post_attention_layernorm = LlamaRMSNorm(shape["width"], config.rms_norm_eps)
        self.mlp = (Qwen2MLP if qwen2 else LlamaMLP)(sized(config, shape))

    def forward(self, x, **scope):
        x = x + self.self_attn(self.input_layernorm(x), **scope)
        return x + self.mlp(self.post_attention_layernorm(x))


BLOCKS = {"gpt2": GPT2Block, "phi": PhiBlock, "llama": LlamaBlock, "qwen2": LlamaBlock}


class Bottleneck(nn.Module):
    """x + up(inner(down(x))), `inner` a block of the family's own at another width."""

    def __init__(self, config, shape, layer):
        super().__init__()
        self.down = nn.Linear(config.hidden_size, shape["width"])
        self.inner = BLOCKS[config.base_model_type](config, shape, layer)
        self.up = nn.Linear(shape["width"], config.hidden_size)

    def forward(self, x, **scope):
        return x + self.up(self.inner(self.down(x), **scope))


def make_block(config, layer):
    shape = config.blocks[layer]
    kind = Bottleneck if shape["kind"] == "bottleneck" else BLOCKS[config.base_model_type]
    return kind(config, shape, layer)


def visible(mask, slots):
    """What SDPA is given: (B, 1, T, S), True where a token may look; the last T of the S are new.

    A token always sees itself: with older torch, a row of padding alone would give NaNs.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    own, every = slots[:, None], torch.arange(int(slots[-1]) + 1, device=slots.device)
    allowed = (every <= own)[None, None]
    if mask is None:
        return allowed
    return allowed & mask[:, None, None, : len(every)].bool() | (every == own)


class KDJaxPreTrainedModel(PreTrainedModel):
    config_class = KDJaxConfig
    base_model_prefix = "model"
    _no_split_modules = ["GPT2Block", "PhiBlock", "LlamaBlock", "Bottleneck"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.gpt2 = config.base_model_type == "gpt2"
        self.base_model_prefix = "transformer" if self.gpt2 else "model"

    def get_input_embeddings(self):
        return self.base_model.wte if self.gpt2 else self.base_model.embed_tokens

    def set_input_embeddings(self, value):
        setattr(self.base_model, "wte" if self.gpt2 else "embed_tokens", value)


class KDJaxModel(KDJaxPreTrainedModel):
    """Embeddings, blocks, last norm."""

    def __init__(self, config):
        super().__init__(config)
        width, count = config.hidden_size, config.num_hidden_layers
        tokens = nn.Embedding(config.vocab_size, width)
        blocks = nn.ModuleList([make_block(config, layer) for layer in range(count)])
        if self.gpt2:
            self.wte, self.h = tokens, blocks
            self.wpe = nn.Embedding(config.max_position_embeddings, width)
            self.ln_f = nn.LayerNorm(width, config.layer_norm_epsilon)
        else:
            self.embed_tokens, self.layers = tokens, blocks
            if config.base_model_type == "phi":
                self.final_layernorm = nn.LayerNorm(width, config.layer_norm_eps)
            else:
                self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        widths = set() if self.gpt2 else {shape["head_width"] for shape in config.blocks}
        self.rotations = {width: Rotation(config, width) for width in widths}
        self.dropout = nn.Dropout(getattr(config, "embd_pdrop", 0.0))
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        slots = known(kwargs, "cache_position").get("cache_position")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        if past_key_values is not None and cache is not None:
            raise ValueError("give either past_key_values or cache")
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        if slots is None:
            seen = 0 if cache is None else cache.get_seq_length()
            slots = torch.arange(seen, seen + x.shape[1], device=x.device)
        position_ids = slots[None] if position_ids is None else position_ids
        if self.gpt2:
            x = x + self.wpe(position_ids)
        x = self.dropout(x)
        tables = {k: each.table(position_ids, x.dtype) for k, each in self.rotations.items()}
        scope = dict(mask=visible(attention_mask, slots), tables=tables, cache=cache, slots=slots)
        hidden = [x]
        for block in self.h if self.gpt2 else self.layers:
            x = block(x, **scope)
            hidden.append(x)
        last = "ln_f" if self.gpt2 else "norm" if hasattr(self, "norm") else "final_layernorm"
        x = hidden[-1] = getattr(self, last)(x)
        kept = {"hidden_states": tuple(hidden)} if output_hidden_states else {}
        kept |= {CACHE: cache} if use_cache else {}
        found = BaseModelOutputWithPast(last_hidden_state=x, **kept)
        return found.to_tuple() if return_dict is False else found


class Tied(nn.Module):
    """What an unembedding has of its own where its weights are the token embeddings."""

    def __init__(self, size, bias):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None


class KDJaxForCausalLM(KDJaxPreTrainedModel, GenerationMixin):
    """With the unembedding."""

    def __init__(self, config):
        super().__init__(config)
        self.add_module(self.base_model_prefix, KDJaxModel(config))
        size, bias = config.vocab_size, config.base_model_type == "phi"
        tied = config.tie_word_embeddings
        self.lm_head = Tied(size, bias) if tied else nn.Linear(config.hidden_size, size, bias)
        self.post_init()

    def get_output_embeddings(self):
        return None if self.config.tie_word_embeddings else self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        of_loss = ("num_items_in_batch", "ignore_index", "shift_labels")
        kwargs = known(kwargs, "cache_position", *of_loss)
        given = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache)
        given |= dict(attention_mask=attention_mask, position_ids=position_ids)
        given |= dict(past_key_values=past_key_values, cache=cache)
        given |= dict(cache_position=kwargs.pop("cache_position", None))
        output = self.base_model(output_hidden_states=output_hidden_states, **given)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = output.last_hidden_state[:, keep]
        head = self.get_input_embeddings() if self.config.tie_word_embeddings else self.lm_head
        logits = F.linear(x, head.weight, self.lm_head.bias)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        kept = {"hidden_states": output.hidden_states, CACHE: getattr(output, CACHE)}
        found = CausalLMOutputWithPast(loss=loss, logits=logits, **kept)
        return found.to_tuple() if return_dict is False else found
