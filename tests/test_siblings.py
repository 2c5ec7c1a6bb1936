"""Scores of whole groups and of texts: against distributions written out one by one, and by hand."""

import pytest
import torch

from test_importance import llama
from tokencredit.lm.load import load_tokenizer, resolve_model
from tokencredit.scores.planning import planning
from tokencredit.scores.siblings import by_prompt, js_divergence

torch.set_num_threads(1)


def by_hand(model, prompts, completions, rows, t, temperature):
    """JS of the living rows' distributions at a position, from the plain model's logits."""
    found = []
    for row in rows:
        if t < len(completions[row]):
            ids = torch.tensor([[*prompts[row], *completions[row]]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(prompts[row]) + t - 1].double() / temperature
            found.append(logits.softmax(-1))
    mean = sum(found) / len(found)
    return float(torch.special.entr(mean).sum() - sum(torch.special.entr(p).sum() for p in found) / len(found))


def test_divergence_is_that_of_the_living_siblings():
    model = llama()
    prompts = [[1, 2, 3]] * 3 + [[4, 5]] * 2
    completions = [[5, 6, 7, 8], [5, 2], [9, 6, 1], [3, 3, 3], []]
    group = by_prompt(prompts)
    assert group == [0, 0, 0, 1, 1]
    found = js_divergence(model, prompts, completions, group, temperature=0.7)
    assert [len(x) for x in found] == [4, 2, 3, 3, 0]
    for row, values in enumerate(found):
        for t, value in enumerate(values.tolist()):
            members = [k for k in range(5) if group[k] == group[row]]
            assert value == pytest.approx(by_hand(model, prompts, completions, members, t, 0.7), abs=1e-6)
    assert found[0][0] == pytest.approx(0, abs=1e-6)  # the first token's prefix is the prompt, the same for all
    assert found[0][1] > 0.01 and found[0][1] == found[1][1] == found[2][1]
    assert found[0][3] == 0 and not found[3].any()  # the only one that is left
    apart = js_divergence(model, prompts, completions, [0, 1, 2, 3, 4])
    assert not any(x.any() for x in apart)


def test_planning_marks_the_tokens_that_a_phrase_touches():
    tokenizer = load_tokenizer(resolve_model("reckon"))
    text = "@1 7 + 2 wait @2 so so 9"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([i]).strip() for i in ids]
    assert planning(tokenizer, [ids])[0].tolist() == [float(piece == "wait") for piece in pieces]
    both = planning(tokenizer, [ids, ids[:1]], ["SO so"])
    assert both[0].tolist() == [float(piece == "so") for piece in pieces] and not both[1].any()
    assert not planning(tokenizer, [ids], ["ai", "o"])[0].any()  # parts of words are no phrases
    with pytest.raises(ValueError, match="looks for phrases"):
        planning(tokenizer, [ids], [" "])
