# SPDX-License-Identifier: Apache-2.0
"""Every operator again in a few lines of PyTorch, differentiable by autograd: the specification that the
library meets. Names and arguments are the schemas'."""

import torch
import torch.nn.functional as F


def rms_norm(x, scale, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale


def relu2_glu(gate, up):
    return gate.relu().square() * up


def silu_glu(gate, up):
    return F.silu(gate) * up


def sigmoid_glu(gate, up):
    return gate.sigmoid() * up


def straight_through(x, quantized):
    """x + (quantized - x).detach(), without its rounding."""
    return quantized.detach() + (x - x.detach())


def ternary_codes(weight, quantizer):
    """Q and gamma; gamma is 1 for threshold."""
    mean = weight.abs().mean()
    if quantizer == "absmean":
        gamma = mean.clamp(min=1e-5)
        return (weight / gamma).round().clamp(-1, 1), gamma
    return weight.sign() * (weight.abs() > mean), torch.ones_like(mean)


def ternary(weight, quantizer):
    """The weight that takes part in the product."""
    q, gamma = ternary_codes(weight, quantizer)
    return gamma * q


def int8_rows(x):
    s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * s).round().clamp(-128, 127) / s


def bit_linear(x, weight, norm_scale=None, *, quantizer="absmean", activation="int8", eps=1e-6, gradient="float32"):
    if norm_scale is not None:
        x = rms_norm(x, norm_scale, eps)
    if activation == "int8":
        x = straight_through(x, int8_rows(x))
    return F.linear(x, straight_through(weight, ternary(weight, quantizer)))


def ternary_glu(
    x, gate_weight, up_weight, down_weight, norm_scale=None, up_norm_scale=None, down_norm_scale=None, *,
    nonlinearity="relu2", **options,
):
    glu = {"relu2": relu2_glu, "silu": silu_glu, "sigmoid": sigmoid_glu}[nonlinearity]
    gate = bit_linear(x, gate_weight, norm_scale, **options)
    up = bit_linear(x, up_weight, norm_scale if up_norm_scale is None else up_norm_scale, **options)
    return x + bit_linear(glu(gate, up), down_weight, down_norm_scale, **options)


def causal_conv1d(x, weight, history=None, *, dilation=1, groups=1):
    past = (weight.size(-1) - 1) * dilation
    if history is None:
        history = x.new_zeros(x.size(0), past, x.size(2))
    seen = torch.cat([history, x], dim=1).transpose(1, 2)
    return F.conv1d(seen, weight, dilation=dilation, groups=groups).transpose(1, 2)


def gated_conv(
    x, norm_scale, gate_weight, value_weight, history=None, *,
    dilation=1, groups=1, eps=1e-6, gradient="float32", precision="float32",
):
    h = rms_norm(x, norm_scale, eps)
    past = None if history is None else rms_norm(history, norm_scale, eps)
    gate = causal_conv1d(h, gate_weight, past, dilation=dilation, groups=groups)
    return x + gate.sigmoid() * causal_conv1d(h, value_weight, past, dilation=dilation, groups=groups)


def mlgru(f, c, h0=None, lower_bound=None, *, activation="none"):
    if activation == "silu":
        bound = 0 if lower_bound is None else lower_bound
        f, c = bound + (1 - bound) * f.sigmoid(), F.silu(c)
    h = f.new_zeros(f.size(0), f.size(2)) if h0 is None else h0
    states = []
    for f_t, c_t in zip(f.unbind(1), c.unbind(1)):
        h = f_t * h + (1 - f_t) * c_t
        states.append(h)
    return torch.stack(states, 1) if states else f * c, h


def mlgru_step(f, c, h, lower_bound=None, *, activation="none"):
    return mlgru(f[:, None], c[:, None], h, lower_bound, activation=activation)[1]


def reduce(loss, nll, kept, reduction):
    """Values of all positions, 0 where they are not kept."""
    if reduction == "none":
        return loss, nll
    count = kept.sum() if reduction == "mean" else 1
    return loss.sum() / count, nll.sum() / count


def linear_cross_entropy(
    h, weight, bias, target, *, label_smoothing=0.0, z_loss=0.0, ignore_index=-100, reduction="mean", precision="float32"
):
    z = F.linear(h, weight, bias)
    lse = z.logsumexp(-1)
    kept = target != ignore_index
    nll = lse - z.gather(-1, target.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * nll + label_smoothing * (lse - z.mean(-1)) + z_loss * lse.square()
    return reduce(loss.where(kept, 0), nll.where(kept, 0).detach(), kept, reduction)


def pack_ternary(weight, *, quantizer="absmean"):
    """Lines of 64 bytes for 64 outputs and 4 k: the code Q + 1 of output 16 j + l and k i is in bits 2j and
    2j + 1 of byte 4 l + i. What is outside the weight has the code of Q = 0."""
    q, gamma = ternary_codes(weight, quantizer)
    out, k = q.shape
    codes = F.pad(q + 1, (0, -k % 4, 0, -out % 64), value=1).to(torch.uint8)
    fields = codes.view(-(-out // 64), 4, 16, -(-k // 4), 4)  # panel, j, l, line, i
    packed = sum(fields[:, j] << 2 * j for j in range(4))
    return packed.transpose(1, 2).reshape(-(-out // 64), -(-k // 4), 64), gamma


def unpack_ternary(packed, scale, out_features, in_features):
    panels, lines, _ = packed.shape
    fields = torch.stack([packed >> 2 * j & 3 for j in range(4)], dim=1)  # panel, j, line, 4 l + i
    fields = fields.view(panels, 4, lines, 16, 4).transpose(2, 3)
    codes = fields.reshape(panels * 64, lines * 4)[:out_features, :in_features]
    return scale * (codes.to(scale.dtype) - 1)


def packed_linear(x, packed, scale, out_features, norm_scale=None, *, activation="int8", eps=1e-6, gradient="float32"):
    if norm_scale is not None:
        x = rms_norm(x, norm_scale, eps)
    if activation == "int8":
        x = int8_rows(x)
    return F.linear(x, unpack_ternary(packed, scale, out_features, x.size(-1)))


def hierarchical_log_prob(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets):
    log_class = F.linear(h, class_weight, class_bias).log_softmax(-1)
    z = F.linear(h, word_weight, word_bias)
    classes = class_words.tensor_split(class_offsets[1:-1])
    parts = [z[..., words].log_softmax(-1) + log_class[..., c, None] for c, words in enumerate(classes)]
    return torch.cat(parts, -1)[..., class_words.argsort()]


def hierarchical_cross_entropy(
    h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets, target, *,
    label_smoothing=0.0, z_loss=0.0, ignore_index=-100, reduction="mean", precision="float32",
):
    kept = target != ignore_index
    place = class_words.argsort()[target.where(kept, 0)]
    class_of_place = torch.arange(len(class_offsets) - 1).repeat_interleave(class_offsets.diff())
    of_class = class_of_place[place]
    level = dict(label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=-1, reduction="none")
    class_loss, class_nll = linear_cross_entropy(h, class_weight, class_bias, of_class.where(kept, -1), **level)
    z = F.linear(h, word_weight, word_bias)[..., class_words]
    same_class = class_of_place == of_class.unsqueeze(-1)
    lse = z.where(same_class, -torch.inf).logsumexp(-1)
    mean = z.where(same_class, 0).sum(-1) / same_class.sum(-1)
    nll = lse - z.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * nll + label_smoothing * (lse - mean) + z_loss * lse.square()
    return reduce(class_loss + loss.where(kept, 0), class_nll + nll.where(kept, 0).detach(), kept, reduction)


def hierarchical_top_k(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets, k):
    log_prob = hierarchical_log_prob(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets)
    return log_prob.topk(k)


def hierarchical_sample(
    h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets, *,
    temperature=1.0, top_k=0, top_p=1.0, generator=None,
):
    """Where the options leave one word; distributions are for tests/ops."""
    log_prob = hierarchical_log_prob(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets)
    return log_prob.argmax(-1)


def adaptive_log_prob(h, head_weight, head_bias, tail_projections, tail_weights):
    head = F.linear(h, head_weight, head_bias).log_softmax(-1)
    shortlist = head.size(-1) - len(tail_weights)
    tails = [
        F.linear(F.linear(h, projection), weight).log_softmax(-1) + head[..., shortlist + i, None]
        for i, (projection, weight) in enumerate(zip(tail_projections, tail_weights))
    ]
    return torch.cat([head[..., :shortlist], *tails], -1)


def adaptive_cross_entropy(
    h, head_weight, head_bias, tail_projections, tail_weights, target, *,
    label_smoothing=0.0, z_loss=0.0, ignore_index=-100, reduction="mean", precision="float32",
):
    kept = target != ignore_index
    first = len(head_weight) - len(tail_weights)
    in_head, inputs = target.clamp(max=first), [(h, head_weight, head_bias)]
    targets = [in_head]
    for i, (projection, weight) in enumerate(zip(tail_projections, tail_weights)):
        inside = (target >= first) & (target < first + len(weight))
        in_head[inside] = len(head_weight) - len(tail_weights) + i
        inputs.append((F.linear(h, projection), weight, None))
        targets.append((target - first).where(inside, -1))
        first += len(weight)
    level = dict(label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=-1, reduction="none")
    losses = [linear_cross_entropy(*x, y.where(kept, -1), **level) for x, y in zip(inputs, targets)]
    return reduce(sum(loss for loss, _ in losses), sum(nll for _, nll in losses), kept, reduction)
