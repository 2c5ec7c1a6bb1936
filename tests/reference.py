"""Slow references in float64, written from the papers and imported by tests only.

A batch is plain lists: reward[i], group[i], tokens[i] (the positions of rollout i that count), scores[name][i][t].
Every function loops over tokens in the order in which the equation is printed. Credit and gradients are lists [B][T]
with 0 off the tokens.
"""

import math
from dataclasses import dataclass


@dataclass
class Batch:
    reward: list
    group: list
    tokens: list
    scores: dict
    width: int

    def zeros(self):
        return [[0.0] * self.width for _ in self.reward]

    def everything(self):
        return [(i, t) for i, row in enumerate(self.tokens) for t in row]

    def groups(self):
        return [[i for i, g in enumerate(self.group) if g == name] for name in dict.fromkeys(self.group)]

    def won(self, i):
        return self.reward[i] > 0

    def comparable(self, members):
        """Both a success and a failure have tokens: otherwise there is no contrast between polarities."""
        return {self.won(i) for i in members if self.tokens[i]} == {True, False}

    def rows(self, values):
        """[B][T]: one number per rollout, at each of its tokens."""
        out = self.zeros()
        for i, t in self.everything():
            out[i][t] = values[i]
        return out


def batch_of(rollouts):
    tokens = [[t for t, on in enumerate(row) if on] for row in rollouts.mask.tolist()]
    scores = {name: x.double().tolist() for name, x in rollouts.scores.items()}
    return Batch(rollouts.reward.double().tolist(), rollouts.group.tolist(), tokens, scores, rollouts.mask.shape[1])


def mean(values):
    return math.fsum(values) / len(values)


def standardise(values, eps, ddof=1):
    """(x − mean) / (std + eps); 0 for values without spread."""
    if not values or max(values) - min(values) <= 1e-13 * max(abs(v) for v in values) or len(values) <= ddof:
        return [0.0] * len(values)
    centre = mean(values)
    spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - ddof))
    return [(v - centre) / (spread + eps) for v in values]


# Rollout credit -------------------------------------------------------------------------------------------------------


def group_center(batch, values, scale="group", eps=1e-6, ddof=1):
    """GRPO sec. 4.1.2: (r − mean) / std. Dr. GRPO: no division. scale="batch": the std over all rollouts of the
    batch.
    """
    out = [0.0] * len(values)
    for members in batch.groups():
        inside = [values[i] for i in members]
        for i, z in zip(members, standardise(inside, eps, ddof)):
            out[i] = z if scale == "group" else (values[i] - mean(inside)) * (min(inside) < max(inside))
    if scale == "batch" and len(values) > ddof:
        centre = mean(values)
        spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - ddof))
        out = [v / (spread + eps) for v in out]
    return out


def leave_one_out(batch, values):
    """RLOO eq. 8: rᵢ − 1/(G−1) Σ_{j≠i} rⱼ; a single rollout has no baseline and gets 0."""
    out = [0.0] * len(values)
    for members in batch.groups():
        for i in members:
            others = [values[j] for j in members if j != i]
            out[i] = values[i] - mean(others) if others else 0.0
    return out


def leave_one_out_of_tokens(batch, credit):
    """PRIME's released masked_rloo: rₜ n/(n−1) − Σₖ mean(rₖ)/(n−1), over the n rollouts of the group with tokens."""
    out = batch.zeros()
    for members in batch.groups():
        alive = [k for k in members if batch.tokens[k]]
        if len(alive) < 2:
            continue
        baseline = math.fsum(mean([credit[k][t] for t in batch.tokens[k]]) for k in alive) / (len(alive) - 1)
        for i in alive:
            for t in batch.tokens[i]:
                out[i][t] = credit[i][t] * (len(alive) / (len(alive) - 1)) - baseline
    return out


def column_center(batch, credit):
    """Every token minus the mean of its group's rollouts that are alive at the position."""
    out = batch.zeros()
    for members in batch.groups():
        for i in members:
            for t in batch.tokens[i]:
                out[i][t] = credit[i][t] - mean([credit[k][t] for k in members if t in batch.tokens[k]])
    return out


def optimal_token_baseline(batch, credit, alone="zero"):
    """OTB: B_t = Σ G W / Σ W over the rollouts alive at t, W the running sum of 1 − 2π + Σπ²."""
    out, energy = batch.zeros(), batch.zeros()
    for i, row in enumerate(batch.tokens):
        total = 0.0
        for t in row:
            total += max(1 - 2 * math.exp(batch.scores["logprob"][i][t]) + batch.scores["sum_p2"][i][t], 0.0)
            energy[i][t] = total
    for members in batch.groups():
        for i in members:
            for t in batch.tokens[i]:
                alive = [k for k in members if t in batch.tokens[k]]
                weights = [energy[k][t] for k in alive]
                if alive == [i]:
                    baseline = 0.0 if alone == "zero" else credit[i][t]
                elif sum(weights) > 0:
                    baseline = math.fsum(credit[k][t] * w for k, w in zip(alive, weights)) / math.fsum(weights)
                else:
                    baseline = mean([credit[k][t] for k in alive])
                out[i][t] = credit[i][t] - baseline
    return out


def batch_whiten(batch, credit, eps=1e-8):
    """REINFORCE++ sec. 3: mean and std over all tokens of the batch."""
    places = batch.everything()
    out = batch.zeros()
    for (i, t), z in zip(places, standardise([credit[i][t] for i, t in places], eps)):
        out[i][t] = z
    return out


def overlong(batch, values, max_length, cache=None, penalty=0.5):
    """DAPO eq. 13, piece by piece, times half the distance of the paper's rewards −1 and 1 to ours, 0 and 1."""
    cache = max_length / 5 if cache is None else cache
    out = []
    for value, row in zip(values, batch.tokens):
        length = len(row)
        if length <= max_length - cache:
            out.append(value)
        elif length <= max_length:
            out.append(value + penalty * (max_length - cache - length) / cache)
        else:
            out.append(value - penalty)
    return out


def group_relative_overlong(batch, values, easy=0.75, punish_failures=False):
    """GTPO appendix D."""
    out = list(values)
    for members in batch.groups():
        wins = [i for i in members if batch.won(i)]
        rate = len(wins) / len(members)
        if rate >= easy:
            reference, target = wins, wins
        elif rate <= 1 - easy:
            continue
        elif len(wins) > len(members) - len(wins):
            reference, target = members, wins
        else:
            reference, target = members, [i for i in members if not batch.won(i)] if punish_failures else []
        lengths = [len(batch.tokens[i]) for i in reference]
        limit = max((min(lengths) + max(lengths)) / 2, mean(lengths))
        for i in target:
            length = len(batch.tokens[i])
            if limit and limit <= length < 2 * limit:
                out[i] -= 0.5 * (length - limit) / limit
            elif limit and length >= 2 * limit:
                out[i] -= 0.5
    return out


# Entropy-shaped credit ------------------------------------------------------------------------------------------------


def entropy_reward(
    batch,
    alpha=(1.0, 0.1),
    level="token",
    compare="column",
    mean_of="arithmetic",
    scope="group",
    failures=True,
    floor=0.01,
):
    """GTPO eqs. 3 and 5, GRPO-S eqs. 8 and 9, appendix C: α₁ r + α₂ (H / Σ H) d, and the same with −1 and 1/H for
    failures.
    """
    out = batch.zeros()
    for i, t in batch.everything():
        out[i][t] = _signed(batch, i, alpha, 1.0, failures)
    populations = batch.groups()
    if scope == "batch":
        populations = [[i for members in populations if batch.comparable(members) for i in members]]
    for members in populations:
        for won in (True, False):
            rows = [i for i in members if batch.won(i) == won and batch.tokens[i]]
            for i in rows:
                for t in batch.tokens[i]:
                    own, peers = _entropies(batch, rows, i, t, level, compare, mean_of, floor)
                    out[i][t] = _signed(batch, i, alpha, _ratio(own, peers, won, mean_of, floor), failures)
    return out


def _signed(batch, i, alpha, ratio, failures):
    if batch.won(i):
        return alpha[0] * batch.reward[i] + alpha[1] * ratio
    return -alpha[0] - alpha[1] * ratio if failures else 0.0


def _entropies(batch, rows, i, t, level, compare, mean_of, floor):
    """(H of token t of rollout i, the H of all that it is compared with)."""
    entropy = batch.scores["entropy"]
    if level == "sequence":
        whole = {}
        for k in rows:
            values = [entropy[k][s] for s in batch.tokens[k]]
            if mean_of == "geometric":
                whole[k] = math.exp(mean([math.log(max(h, floor)) for h in values]))
            else:
                whole[k] = mean(values)
        return whole[i], list(whole.values())
    if compare == "column":
        return entropy[i][t], [entropy[k][t] for k in rows if t in batch.tokens[k]]
    if compare == "row":
        return entropy[i][t], [entropy[i][s] for s in batch.tokens[i]]
    return entropy[i][t], [entropy[k][s] for k in rows for s in batch.tokens[k]]


def _ratio(own, peers, won, mean_of, floor):
    if not won:
        own, peers = 1 / max(own, floor), [1 / max(h, floor) for h in peers]
    elif mean_of == "geometric":
        own, peers = max(own, floor), [max(h, floor) for h in peers]
    if mean_of == "geometric":
        return own / math.prod(peers) ** (1 / len(peers))
    return own / math.fsum(peers) * len(peers) if math.fsum(peers) else 1.0


def polarity_center(batch, credit, scope="group", population="all", level="token", eps=1e-6):
    """GTPO eq. 6: R⁺ holds the shaped rewards of successes and a 0 for every token of a failure; R⁻ the other way
    round.
    """
    out = batch.zeros()
    populations = [members for members in batch.groups() if batch.comparable(members)]
    if scope == "batch":
        populations = [[i for members in populations for i in members]]
    for members in populations:
        if level == "token":
            places = [(i, t) for i in members for t in batch.tokens[i]]
        else:
            places = [
                (i, batch.tokens[i][0]) for i in members if batch.tokens[i]
            ]  # the shaped reward of a rollout is one number
        for won in (True, False):
            if population == "all":
                values = [credit[i][t] if batch.won(i) == won else 0.0 for i, t in places]
                used = places
            elif population == "within_polarity":
                used = [(i, t) for i, t in places if batch.won(i) == won]
                values = [credit[i][t] for i, t in used]
            else:
                used, values = places, [credit[i][t] for i, t in places]
            for (i, t), z in zip(used, standardise(values, eps)):
                if batch.won(i) == won:
                    for s in [t] if level == "token" else batch.tokens[i]:
                        out[i][s] = z
    return out


# Token weights --------------------------------------------------------------------------------------------------------


def top_tokens(batch, score, fraction):
    """Beyond the 80/20 rule: the tokens at or above the ⌈ρN⌉-th largest score of the batch."""
    values = sorted((batch.scores[score][i][t] for i, t in batch.everything()), reverse=True)
    if not values:
        return set()
    threshold = values[math.ceil(round(fraction * len(values), 9)) - 1]
    return {(i, t) for i, t in batch.everything() if batch.scores[score][i][t] >= threshold}


def tokens_above(batch, score, threshold=0.0):
    return {(i, t) for i, t in batch.everything() if batch.scores[score][i][t] > threshold}


def keep_only(batch, credit, chosen):
    out = batch.zeros()
    for i, t in chosen:
        out[i][t] = credit[i][t]
    return out


def inclusion(batch, credit, score=None, fraction=0.2, power=1.0, floor=0.02, by_credit=True, scope="batch"):
    """Probabilities of being kept: φ + (1 − φ) min(1, κ s), κ by bisection so that they add up to fraction · N, for
    tokens with credit.
    """
    rows = range(len(batch.reward))
    populations = {"batch": [list(rows)], "group": batch.groups(), "row": [[i] for i in rows]}[scope]
    q = batch.zeros()
    for members in populations:
        places = [(i, t) for i in members for t in batch.tokens[i] if credit[i][t] != 0]
        size = {}
        for i, t in places:
            x = 1.0 if score is None else batch.scores[score][i][t] ** power
            size[i, t] = x * (abs(credit[i][t]) if by_credit else 1.0)
        some, budget = sum(s > 0 for s in size.values()), len(size) * (fraction - floor) / (1 - floor)
        if some <= budget:
            size = {place: 1.0 if s > 0 else (budget - some) / (len(size) - some) for place, s in size.items()}
        low, high = 0.0, 1 / min((s for s in size.values() if s > 0), default=1.0)
        share = lambda kappa, s: floor + (1 - floor) * min(1.0, kappa * s)  # noqa: E731
        for _ in range(2000):
            kappa = (low + high) / 2 if low == 0 or high / low < 2 else math.sqrt(low * high)
            if math.fsum(share(kappa, s) for s in size.values()) < fraction * len(places):
                low = kappa
            else:
                high = kappa
        for (i, t), s in size.items():
            q[i][t] = share(high, s) if share(high, s) < 1 - 1e-4 else 1.0
    return q


def token_sampling(batch, credit, **settings):
    """Poisson sampling: kept where u < q, and divided by q."""
    q, out = inclusion(batch, credit, **settings), batch.zeros()
    for i, t in batch.everything():
        if credit[i][t] != 0 and (batch.scores["uniform"][i][t] < q[i][t] or q[i][t] == 1):
            out[i][t] = credit[i][t] / q[i][t]
    return out


def entropy_advantage(batch, credit, alpha=0.4, kappa=2.0):
    """Reasoning with exploration: A + min(α H, |A| / κ)."""
    out = batch.zeros()
    for i, t in batch.everything():
        out[i][t] = credit[i][t] + min(alpha * batch.scores["entropy"][i][t], abs(credit[i][t]) / kappa)
    return out


def proxy_weight(batch, credit, score, normalise="min_max"):
    out = batch.zeros()
    for i, row in enumerate(batch.tokens):
        x = [batch.scores[score][i][t] for t in row]
        for t in row:
            own = batch.scores[score][i][t]
            if normalise == "raw":
                weight = own
            elif normalise == "min_max":
                weight = (own - min(x)) / (max(x) - min(x)) if max(x) > min(x) else 1.0
            elif normalise == "mean_one":
                weight = own / mean(x) if mean(x) else 1.0
            else:
                rank = sum(v < own for v in x) + (x.count(own) + 1) / 2
                weight = (2 * rank - 1) / len(x)
            out[i][t] = credit[i][t] * weight
    return out


def group_weight(batch, credit, score, high=1.7):
    """TW-GRPO: 1 + (α − 1) (D − min D) / (max D − min D), over the tokens of the group."""
    out = batch.zeros()
    for members in batch.groups():
        x = [batch.scores[score][k][s] for k in members for s in batch.tokens[k]]
        for i in members:
            for t in batch.tokens[i]:
                share = (batch.scores[score][i][t] - min(x)) / (max(x) - min(x)) if max(x) > min(x) else 0.0
                out[i][t] = credit[i][t] * (1 + (high - 1) * share)
    return out


def proxy_weight_of_groups(batch, credit, score, normalise):
    """The same with minimum, maximum and mean over the tokens of the group: for a pair, of both its completions."""
    out = batch.zeros()
    for members in batch.groups():
        x = [batch.scores[score][k][s] for k in members for s in batch.tokens[k]]
        for i in members:
            for t in batch.tokens[i]:
                own = batch.scores[score][i][t]
                if normalise == "min_max":
                    own = (own - min(x)) / (max(x) - min(x)) if max(x) > min(x) else 1.0
                elif normalise == "mean_one":
                    own = own / mean(x) if mean(x) else 1.0
                out[i][t] = credit[i][t] * own
    return out


def tilt(batch, credit, score, low=-0.5, high=1.5):
    """TIS-DPO: exp(clip(x)) for positive credit, exp(−clip(x)) for negative."""
    out = batch.zeros()
    for i, t in batch.everything():
        x = min(max(batch.scores[score][i][t], low), high)
        out[i][t] = credit[i][t] * math.exp(x if credit[i][t] > 0 else -x)
    return out


def length_mean(batch, credit):
    """SimPO: a mean over the tokens in place of a sum."""
    out = batch.zeros()
    for i, row in enumerate(batch.tokens):
        num = sum(credit[i][t] != 0 for t in row)
        for t in row:
            out[i][t] = credit[i][t] / num if num else 0.0
    return out


def top_by_outcome(batch, score, fraction):
    """SePO: of every completion, the highest scores if it was right, the lowest if it was not."""
    chosen = set()
    for i, row in enumerate(batch.tokens):
        side = {t: batch.scores[score][i][t] * (1 if batch.won(i) else -1) for t in row}
        if row:
            threshold = sorted(side.values(), reverse=True)[math.ceil(round(fraction * len(row), 9)) - 1]
            chosen |= {(i, t) for t in row if side[t] >= threshold}
    return chosen


def amplify(batch, credit, score, up=0.2, down=0.2, floor=0.0, base=1.0):
    """HICRA: A + α |A| m; TGDPO's weights 1 + α r̂ and 1 − α r̂, at least `floor`."""
    out = batch.zeros()
    for i, t in batch.everything():
        c, x = credit[i][t], batch.scores[score][i][t]
        if c > 0:
            out[i][t] = c * max(floor, base + up * x)
        elif c < 0:
            out[i][t] = c * max(floor, base - down * x)
    return out


def bound_credit(batch, credit, k=2.0):
    """OSPO: clamp to ± k std over all tokens."""
    out, places = batch.zeros(), batch.everything()
    values = [credit[i][t] for i, t in places]
    spread = 0.0
    if len(values) > 1 and max(values) - min(values) > 1e-13 * max(abs(v) for v in values):
        spread = math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))
    for i, t in places:
        out[i][t] = min(max(credit[i][t], -k * spread), k * spread) if spread else credit[i][t]
    return out


# Sums along a rollout -------------------------------------------------------------------------------------------------


def returns(batch, credit, gamma=1.0):
    out = batch.zeros()
    for i, row in enumerate(batch.tokens):
        for place, t in enumerate(row):
            out[i][t] = math.fsum(gamma**k * credit[i][s] for k, s in enumerate(row[place:]))
    return out


def to_go(batch, credit, score, scale=1.0, clip=None, gamma=1.0, past=False):
    """RTO: clip(β log π_dpo/π_ref) at every token, as a return, beside the outcome's."""
    bound = math.inf if clip is None else clip
    out = batch.zeros()
    for i, row in enumerate(batch.tokens):
        reward = {t: min(max(scale * batch.scores[score][i][t], -bound), bound) for t in row}
        for place, t in enumerate(row):
            near = row[place::-1] if past else row[place:]
            out[i][t] = credit[i][t] + math.fsum(gamma**k * reward[s] for k, s in enumerate(near))
    return out


def token_reward(batch, credit, score="token_reward", scale=1.0, normalise="std", gamma=1.0):
    """GRPO, process supervision: each reward that was given less the mean of those of the group, over their std, and at
    each token the sum of those from it on.
    """
    out = [list(row) for row in credit]
    for members in batch.groups():
        given = [(i, t) for i in members for t in batch.tokens[i] if not math.isnan(batch.scores[score][i][t])]
        values = [batch.scores[score][i][t] for i, t in given]
        if normalise == "std":
            normal = dict(zip(given, standardise(values, 1e-6)))
        else:
            normal = {at: batch.scores[score][at[0]][at[1]] - mean(values) for at in given}
        for i in members:
            row = batch.tokens[i]
            for place, t in enumerate(row):
                after = ((k, (i, s)) for k, s in enumerate(row[place:]))
                out[i][t] += scale * math.fsum(gamma**k * normal[at] for k, at in after if at in normal)
    return keep_only(batch, out, batch.everything())


def redistribute(batch, credit, score, share=0.8):
    """ABC: β R α_t / Σ α at every token, (1 − β) R at the last, then what is to come."""
    out = batch.zeros()
    for i, row in enumerate(batch.tokens):
        whole = math.fsum(batch.scores[score][i][t] for t in row)
        for place, t in enumerate(row):
            left = math.fsum(batch.scores[score][i][s] for s in row[place:]) / whole if whole else 1.0
            out[i][t] = credit[i][t] * (1 - share) + credit[i][t] * share * left
    return out


# Bonuses --------------------------------------------------------------------------------------------------------------


def confidence(batch, i, fraction=0.2):
    """ProGRPO: exp of the mean log-prob of the ⌈ρ|o|⌉ least likely tokens."""
    row = batch.tokens[i]
    if not row:
        return 0.0
    least = sorted(batch.scores["logprob"][i][t] for t in row)[: max(math.ceil(round(fraction * len(row), 9)), 1)]
    return math.exp(mean(least))


def confidence_bonus(batch, credit, alpha=0.3, fraction=0.2, prompt="none", all_correct=False):
    out = batch.zeros()
    for members in batch.groups():
        wins = sum(batch.won(k) for k in members)
        takes = wins > 0 and (all_correct or wins < len(members))
        alive = [confidence(batch, k, fraction) for k in members if batch.tokens[k]]
        for i in members:
            for t in batch.tokens[i]:
                asked = {"none": 0.0, "group_mean": mean(alive)}.get(prompt)
                asked = batch.scores["prompt_confidence"][i][t] if asked is None else asked
                out[i][t] = credit[i][t] + takes * alpha * (asked - confidence(batch, i, fraction))
    return out


def entropy_gradient(batch, credit, coef=0.001, target=None, difficulty=None, past=False):
    """c + α λ (−log π − H); Skywork-OR1: α only where the mean entropy is at most the target."""
    out, places = batch.zeros(), batch.everything()
    level = mean([batch.scores["entropy"][i][t] for i, t in places]) if places else 0.0
    on = target is None or level <= target
    for members in batch.groups():
        rate = sum(batch.won(k) for k in members) / len(members)
        for i in members:
            for t in batch.tokens[i]:
                known = batch.scores["past_pass_rate"][i][t] if past else rate
                need = 1.0 if difficulty is None else max(0.0, 1 - known / difficulty)
                gap = -batch.scores["logprob"][i][t] - batch.scores["entropy"][i][t]
                out[i][t] = credit[i][t] + on * coef * need * gap
    return out


def add(batch, first, second):
    out = batch.zeros()
    for i, t in batch.everything():
        out[i][t] = first[i][t] + second[i][t]
    return out


# Weights of tokens in the loss ----------------------------------------------------------------------------------------


def aggregate(batch, kind, length=None, choose=None):
    out = batch.zeros()
    num_rows, num_tokens = len(batch.reward), len(batch.everything())
    choose = choose or (lambda b: top_tokens(b, "entropy", 0.2) if kind == "selected" else set(b.everything()))
    chosen = choose(batch)
    longest = max((len(row) for row in batch.tokens), default=0)
    for i, t in chosen:
        out[i][t] = {
            "token": 1 / num_tokens,
            "sequence": 1 / num_rows / len(batch.tokens[i]),
            "sum": 1 / num_rows / (length or longest),
            "selected": 1 / len(chosen),
        }[kind]
    return out


# Losses of single tokens: (loss, derivative with respect to log π_θ), by hand -----------------------------------------


def ratio_of(logprob, old):
    return math.exp(logprob - old)


def clip(logprob, old, c, chosen, low=0.2, high=0.2, dual=None):
    """min(w c, clip(w) c): the clip stops a token when w > 1 + high and c > 0, or when w < 1 − low and c < 0. dw/dlog π
    = w.
    """
    w = ratio_of(logprob, old)
    objective = min(w * c, min(max(w, 1 - low), 1 + high) * c)
    stopped = (c > 0 and w > 1 + high) or (c < 0 and w < 1 - low)
    if dual is not None and c < 0 and objective < dual * c:
        return -dual * c, 0.0
    return -objective, 0.0 if stopped else -w * c


def log_prob(logprob, old, c, chosen):
    return -c * logprob, -c


def cispo(logprob, old, c, chosen, cap=5.0, floor=0.0):
    held = min(max(ratio_of(logprob, old), floor), cap)
    return -held * c * logprob, -held * c


def sapo(logprob, old, c, chosen, positive=1.0, negative=1.05):
    """f(w) = 4/τ σ(τ(w − 1)); df/dw = 4 σ (1 − σ)."""
    w, tau = ratio_of(logprob, old), positive if c > 0 else negative
    gate = 1 / (1 + math.exp(-tau * (w - 1)))
    return -4 / tau * gate * c, -4 * gate * (1 - gate) * w * c


def ce_gppo(logprob, old, c, chosen, beta=(0.5, 1.0), low=0.2, high=0.2, dual=None):
    w = ratio_of(logprob, old)
    if w < 1 - low and c < 0:
        return -beta[0] * (1 - low) * c, -beta[0] * (1 - low) * c
    if w > 1 + high and c > 0:
        return -beta[1] * (1 + high) * c, -beta[1] * (1 + high) * c
    if dual is not None and c < 0 and w > dual:
        return -dual * c, 0.0
    return -w * c, -w * c


def low_entropy_kl(logprob, old, c, chosen, low=1.0, high=math.inf):
    """SENT: PPO's loss, and κ |log π − log π_old|, with κ in place of a choice."""
    loss, slope = clip(logprob, old, c, 0.0, low, high)
    gap = logprob - old
    return loss + chosen * abs(gap), slope + chosen * ((gap > 0) - (gap < 0))


def clip_cov(logprob, old, c, chosen, low=1.0, high=1.0):
    return (0.0, 0.0) if chosen else clip(logprob, old, c, chosen, low, high)


def kl_cov(logprob, old, c, chosen, beta=1.0):
    w, gap = ratio_of(logprob, old), logprob - old
    sign = (gap > 0) - (gap < 0)
    return -w * c + beta * abs(gap) * chosen, -w * c + beta * sign * chosen


def token_losses(batch, rule, logprob, old, credit, weights, chosen=None, **constants):
    """(loss, gradient) of Σ ω ℓ for a rule whose tokens do not interact; `chosen` {token: coefficient}."""
    total, gradient = [], batch.zeros()
    for i, t in batch.everything():
        loss, slope = rule(logprob[i][t], old[i][t], credit[i][t], (chosen or {}).get((i, t), 0.0), **constants)
        total.append(weights[i][t] * loss)
        gradient[i][t] = weights[i][t] * slope
    return math.fsum(total), gradient


def sequence_losses(batch, logprob, old, credit, weights, low, high, mean_of="geometric", token=False):
    """GSPO eq. 5 and 7, GSPO-token eq. 13, GRPO-S eq. 11: the derivative of sᵢ reaches every token of the rollout."""
    total, gradient = [], batch.zeros()
    for i, row in enumerate(batch.tokens):
        if not row:
            continue
        w = {t: ratio_of(logprob[i][t], old[i][t]) for t in row}
        s = math.prod(w.values()) ** (1 / len(row)) if mean_of == "geometric" else mean(list(w.values()))
        slope_of_s = 0.0
        for t in row:
            c = credit[i][t]
            total.append(-weights[i][t] * min(s * c, min(max(s, 1 - low), 1 + high) * c))
            free = not ((c > 0 and s > 1 + high) or (c < 0 and s < 1 - low))
            slope_of_s += -weights[i][t] * c * free
            gradient[i][t] = -weights[i][t] * c * free * s  # d s_it / d log π_it = s in GSPO-token
        if not token:
            for t in row:
                gradient[i][t] = slope_of_s * (s if mean_of == "geometric" else w[t]) / len(row)
    return math.fsum(total), gradient


def hybrid_losses(
    batch,
    logprob,
    old,
    credit,
    weights,
    chosen=None,
    low=0.2,
    high=0.2,
    seq_low=3e-4,
    seq_high=4e-4,
    mix=0.5,
    outer="min_of_mixes",
):
    """DHPO: token ratio and GSPO-token ratio, each clipped in its own range, then mixed; the three outer readings."""
    total, gradient = [], batch.zeros()
    for i, row in enumerate(batch.tokens):
        if not row:
            continue
        s = math.exp(mean([logprob[i][t] - old[i][t] for t in row]))
        for t in row:
            w, c = ratio_of(logprob[i][t], old[i][t]), credit[i][t]
            share = chosen.get((i, t), 0.0) if mix == "entropy" else mix
            near, far = min(max(w, 1 - low), 1 + high), min(max(s, 1 - seq_low), 1 + seq_high)
            # d w / d log π = w, and d s_it / d log π_it = s; a bound that holds has no derivative.
            near_slope, far_slope = w * (near == w), s * (far == s)
            mixed, clipped = share * w + (1 - share) * s, share * near + (1 - share) * far
            clipped_slope = share * near_slope + (1 - share) * far_slope
            if outer == "mix_of_clips":
                value, slope = clipped * c, clipped_slope * c
            elif outer == "min_of_mixes":
                value = min(mixed * c, clipped * c)
                slope = (share * w + (1 - share) * s if mixed * c < clipped * c else clipped_slope) * c
            else:
                value = share * min(w * c, near * c) + (1 - share) * min(s * c, far * c)
                token = w if w * c < near * c else near_slope
                whole = s if s * c < far * c else far_slope
                slope = (share * token + (1 - share) * whole) * c
            total.append(-weights[i][t] * value)
            gradient[i][t] = -weights[i][t] * slope
    return math.fsum(total), gradient


def planned(plan):
    """{token: coefficient} of a plan, or None."""
    if plan.coefficient is None:
        return None
    return {(i, t): plan.coefficient[i, t].item() for i, t in plan.coefficient.nonzero().tolist()}


def low_entropy_covariances(batch, logprob, credit, share=0.8):
    """SENT: {token: Cov} of the tokens of lowest entropy, by sorting; their own means."""
    places = sorted(batch.everything(), key=lambda place: batch.scores["entropy"][place[0]][place[1]])
    calm = places[: max(math.floor(round(share * len(places), 9)), 1)]
    if not calm:
        return {}
    centre, level = mean([logprob[i][t] for i, t in calm]), mean([credit[i][t] for i, t in calm])
    return {(i, t): (logprob[i][t] - centre) * (credit[i][t] - level) for i, t in calm}


def low_entropy_coefficients(cov, fraction=2e-4, beta=(0.2, 0.0, 0.05)):
    """SENT: {token: κ}: beta[0] for the largest of the covariances, beta[2] for the smallest, beta[1] between."""
    order = sorted(cov, key=cov.get)
    few = max(math.floor(round(fraction * len(cov), 9)), 1)
    return dict.fromkeys(order, beta[1]) | dict.fromkeys(order[:few], beta[2]) | dict.fromkeys(order[-few:], beta[0])


def covariances(batch, logprob, credit):
    """The entropy mechanism eq. 10: {token: (log π − mean log π)(A − mean A)}."""
    places = batch.everything()
    if not places:
        return {}
    centre, level = mean([logprob[i][t] for i, t in places]), mean([credit[i][t] for i, t in places])
    return {(i, t): (logprob[i][t] - centre) * (credit[i][t] - level) for i, t in places}


# The published methods ------------------------------------------------------------------------------------------------


def _grpo(batch):
    return batch.rows(group_center(batch, batch.reward))


def _gtpo(**reading):
    shape = {k: v for k, v in reading.items() if k != "population"}
    kept = {k: v for k, v in reading.items() if k in ("level", "scope", "population")}
    return lambda batch: polarity_center(batch, entropy_reward(batch, **shape), **kept)


def _unsure(batch):
    """SPO: the tokens whose probability is below 0.9."""
    return {(i, t) for i, t in batch.everything() if math.exp(batch.scores["logprob"][i][t]) < 0.9}


CREDIT = {
    "reinforce": lambda b: b.rows(b.reward),
    "grpo": _grpo,
    "dr_grpo": lambda b: b.rows(group_center(b, b.reward, scale="none")),
    "rloo": lambda b: b.rows(leave_one_out(b, b.reward)),
    "reinforce_pp_baseline": lambda b: batch_whiten(b, b.rows(group_center(b, b.reward, scale="none"))),
    "otb": lambda b: optimal_token_baseline(b, b.rows(b.reward)),
    "dapo": _grpo,
    "gspo": _grpo,
    "gspo_token": _grpo,
    "cispo": _grpo,
    "sapo": _grpo,
    "gtpo": _gtpo(),
    "grpo_s": _gtpo(level="sequence"),
    "gtpo_geometric": _gtpo(mean_of="geometric"),
    "grpo_s_geometric": _gtpo(level="sequence", mean_of="geometric"),
    "gtpo_2025_08": _gtpo(alpha=(0.9, 0.1), failures=False, population="joint"),
    "forking_tokens": lambda b: keep_only(b, _grpo(b), top_tokens(b, "entropy", 0.2)),
    "random_tokens": lambda b: keep_only(b, _grpo(b), top_tokens(b, "uniform", 0.2)),
    "oracle_positions": lambda b: keep_only(b, _grpo(b), tokens_above(b, "oracle_positions")),
    "entropy_advantage": lambda b: entropy_advantage(b, _grpo(b)),
    "clip_cov": _grpo,
    "kl_cov": _grpo,
    "ce_gppo": _grpo,
    "ptw_entropy": lambda b: proxy_weight(b, _grpo(b), "entropy"),
    "ptw_fisher": lambda b: proxy_weight(b, _grpo(b), "fisher_trace"),
    "ptw_gradient_norm": lambda b: proxy_weight(b, _grpo(b), "gradient_norm"),
    "ptw_perturbation": lambda b: proxy_weight(b, _grpo(b), "perturbation_variance"),
    "ptw_attention": lambda b: proxy_weight(b, _grpo(b), "attention"),
    "token_sampling": lambda b: token_sampling(b, _grpo(b), score="head_norm"),
    "vineppo": lambda b: batch_whiten(b, b.scores["step_gain"]),
    "exact_value": lambda b: keep_only(b, b.scores["exact_value"], b.everything()),
    "learned_credit": lambda b: keep_only(b, b.scores["learned_credit"], b.everything()),
    "arm": lambda b: confidence_bonus(b, _grpo(b)),
    "dhpo": _grpo,
    "sent": _grpo,
    "tw_grpo": lambda b: group_weight(b, _grpo(b), "js_divergence"),
    "rto_group": lambda b: column_center(b, to_go(b, b.rows(b.reward), "implicit_reward", 0.05, 0.05)),
    "grpo_process": lambda b: token_reward(b, _grpo(b)),
    "hicra": lambda b: amplify(b, _grpo(b), "planning"),
    "spro": lambda b: add(b, _grpo(b), column_center(b, to_go(b, b.zeros(), "self_reward", 0.05, past=True))),
    "abc": lambda b: column_center(b, redistribute(b, b.rows(b.reward), "attention")),
    "prime_offline": lambda b: batch_whiten(
        b,
        add(
            b,
            b.rows(leave_one_out(b, b.reward)),
            returns(b, leave_one_out_of_tokens(b, b.scores["implicit_reward"])),
        ),
    ),
    "spo_chain": lambda b: keep_only(b, batch_whiten(b, b.scores["step_gain"]), _unsure(b)),
    "entropy_bonus": lambda b: entropy_gradient(b, _grpo(b)),
    "entropy_bonus_adaptive": lambda b: entropy_gradient(b, _grpo(b), coef=0.0, target=0.2),
}

LOSS = {  # (rule, constants, aggregation)
    "reinforce": (log_prob, {}, ("sum", 1)),
    "grpo": (clip, {}, ("sequence",)),
    "dr_grpo": (clip, {}, ("sum",)),
    "rloo": (log_prob, {}, ("sum", 1)),
    "reinforce_pp_baseline": (clip, {}, ("token",)),
    "otb": (clip, {}, ("token",)),
    "dapo": (clip, {"high": 0.28}, ("token",)),
    "gspo": (sequence_losses, {"low": 3e-4, "high": 4e-4}, ("sequence",)),
    "gspo_token": (sequence_losses, {"low": 3e-4, "high": 4e-4, "token": True}, ("sequence",)),
    "cispo": (cispo, {}, ("token",)),
    "sapo": (sapo, {}, ("sequence",)),
    "gtpo": (clip, {"high": 0.28}, ("token",)),
    "grpo_s": (sequence_losses, {"low": 0.2, "high": 0.28, "mean_of": "arithmetic"}, ("sequence",)),
    "gtpo_geometric": (clip, {"high": 0.28}, ("token",)),
    "grpo_s_geometric": (sequence_losses, {"low": 0.2, "high": 0.28}, ("sequence",)),
    "gtpo_2025_08": (clip, {"high": 0.28}, ("token",)),
    "forking_tokens": (clip, {"high": 0.28}, ("selected", None, lambda b: top_tokens(b, "entropy", 0.2))),
    "random_tokens": (clip, {"high": 0.28}, ("selected", None, lambda b: top_tokens(b, "uniform", 0.2))),
    "oracle_positions": (clip, {"high": 0.28}, ("selected", None, lambda b: tokens_above(b, "oracle_positions"))),
    "entropy_advantage": (clip, {"high": 0.28}, ("token",)),
    "clip_cov": (clip_cov, {}, ("token",)),
    "kl_cov": (kl_cov, {}, ("token",)),
    "ce_gppo": (ce_gppo, {}, ("token",)),
    "ptw_entropy": (clip, {}, ("token",)),
    "ptw_fisher": (clip, {}, ("token",)),
    "ptw_gradient_norm": (clip, {}, ("token",)),
    "ptw_perturbation": (clip, {}, ("token",)),
    "ptw_attention": (clip, {}, ("token",)),
    "token_sampling": (clip, {}, ("token",)),
    "vineppo": (clip, {}, ("token",)),
    "exact_value": (clip, {}, ("token",)),
    "learned_credit": (clip, {}, ("token",)),
    "arm": (clip, {"high": 0.28}, ("token",)),
    "dhpo": (hybrid_losses, {}, ("sequence",)),
    "sent": (low_entropy_kl, {}, ("token",)),
    "tw_grpo": (clip, {}, ("token",)),
    "rto_group": (clip, {}, ("token",)),
    "grpo_process": (clip, {}, ("sequence",)),
    "hicra": (clip, {}, ("token",)),
    "spro": (clip, {}, ("token",)),
    "abc": (clip, {}, ("token",)),
    "prime_offline": (clip, {}, ("token",)),
    "spo_chain": (clip, {}, ("selected", None, _unsure)),
    "entropy_bonus": (clip, {}, ("token",)),
    "entropy_bonus_adaptive": (clip, {}, ("token",)),
}


def method_loss(name, batch, logprob, old, credit, chosen=None):
    """(loss, gradient) of a published method for a given credit and given coefficients {token: κ}."""
    rule, constants, how = LOSS[name]
    weights = aggregate(batch, *how)
    if rule is sequence_losses:
        return sequence_losses(batch, logprob, old, credit, weights, **constants)
    if rule is hybrid_losses:
        return hybrid_losses(batch, logprob, old, credit, weights, chosen, **constants)
    return token_losses(batch, rule, logprob, old, credit, weights, chosen, **constants)


# Pairs ----------------------------------------------------------------------------------------------------------------

PREFERENCE_CREDIT = {
    "dpo": lambda b: b.rows(b.reward),
    "dpo_entropy": lambda b: proxy_weight_of_groups(b, b.rows(b.reward), "entropy", "mean_one"),
    "dpo_forking": lambda b: keep_only(
        b,
        b.rows(b.reward),
        {(i, t) for i, row in enumerate(b.tokens) for t in _most_uncertain(b, i, row)},
    ),
    "sepo": lambda b: length_mean(b, keep_only(b, b.rows(b.reward), top_by_outcome(b, "implicit_reward", 0.3))),
    "tgdpo": lambda b: amplify(b, b.rows(b.reward), "implicit_reward", 0.05, 0.05, -math.inf),
    "tis_dpo": lambda b: tilt(b, b.rows(b.reward), "contrast"),
    "simpo": lambda b: length_mean(b, b.rows(b.reward)),
    "dpo_pivotal": lambda b: amplify(b, b.rows(b.reward), "before_after", 1.0, 1.0, base=0.0),
}


def _most_uncertain(batch, i, row):
    values = sorted((batch.scores["entropy"][i][t] for t in row), reverse=True)
    threshold = values[math.ceil(round(0.2 * len(row), 9)) - 1] if row else 0.0
    return [t for t in row if batch.scores["entropy"][i][t] >= threshold]


def logistic(m, gamma=0.0, smoothing=0.0):
    """(f, f'): −(1 − ε) log σ(m − γ) − ε log σ(γ − m)."""
    up = 1 / (1 + math.exp(-(m - gamma)))
    loss = (1 - smoothing) * math.log1p(math.exp(gamma - m)) + smoothing * math.log1p(math.exp(m - gamma))
    return loss, -(1 - smoothing) * (1 - up) + smoothing * up


def squared(m):
    return (m - 0.5) ** 2, 2 * (m - 0.5)


def hinge(m):
    return max(0.0, 1 - m), -1.0 if m < 1 else 0.0


def preference_loss(batch, logprob, ref, credit, weight, beta, link, reference_free=False):
    """(loss, gradient, margins) of Σ ω f(m) / Σ ω, pair by pair, token by token."""
    num, whole = len(weight), math.fsum(weight)
    total, margins, gradient = [], [], batch.zeros()
    for p in range(num):
        margin = 0.0
        for i in (p, p + num):
            for t in batch.tokens[i]:
                margin += beta * credit[i][t] * (logprob[i][t] - (0.0 if reference_free else ref[i][t]))
        loss, slope = link(margin)
        margins.append(margin)
        total.append(weight[p] * loss / whole if whole else 0.0)
        for i in (p, p + num):
            for t in batch.tokens[i]:
                gradient[i][t] = weight[p] / whole * slope * beta * credit[i][t] if whole else 0.0
    return math.fsum(total), gradient, margins
