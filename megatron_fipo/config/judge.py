"""Section of the schema: how a language model at an endpoint judges responses, with reward.rule=judge."""

from dataclasses import dataclass

from megatron_fipo.config.settings import setting

RESPONSE = "{response}"
"""The placeholder in `reward.judge.prompt` that has to be there; {prompt} and GROUND_TRUTH may be."""

GROUND_TRUTH = "{ground_truth}"
"""Its placeholder of the right answer."""

JUDGE_MARGIN_S = 2.0
"""What a judge's last attempt leaves of reward.timeout_s, so that its own error is what is reported."""


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint. reward.workers is the number of requests at a time."""

    url: str = setting("", "Base URL of the endpoint, such as http://judge:8000/v1; /chat/completions is added.")
    model: str = setting("", "Name of the model there.")
    prompt: str = setting(
        "Question:\n{prompt}\n\nReference answer: {ground_truth}\n\nResponse:\n{response}\n\n"
        "Is the response right? End with one line: Score: N, where N is from 0 (wrong) to 10 (right).",
        "The judge's user message. The response replaces {response}, the problem as the policy read it {prompt}, and "
        "the right answer {ground_truth}.",
    )
    score_pattern: str = setting(
        r"Score:[\s*]*(-?[0-9]+(?:\.[0-9]+)?)",
        "A regular expression with one group, a number; its last match in the reply is the score. A reply without one "
        "is a failed check.",
    )
    score_wrong: float = setting(0.0, "The score that is accuracy 0.", minimum=-1e6, maximum=1e6)
    score_right: float = setting(
        10.0, "The score that is accuracy 1. A score outside of the two is a failed check.", minimum=-1e6, maximum=1e6
    )
    temperature: float = setting(0.0, "The judge's sampling temperature.", minimum=0, maximum=2)
    max_tokens: int = setting(512, "Longest reply, in tokens.", minimum=1, maximum=10**6)
    key_variable: str | None = setting(
        None, "Environment variable with the endpoint's key, such as OPENAI_API_KEY. null: no key is sent."
    )
    cache: str | None = setting(
        None, "Directory of replies, which several runs may share: the same request is not sent twice. null: no cache."
    )
    attempts: int = setting(
        4,
        "How many times a request is sent if the endpoint cannot be reached, is busy (429) or fails (5xx), with longer "
        "waits between them; all within reward.timeout_s.",
        minimum=1,
        maximum=100,
    )
    request_timeout_s: float = setting(60.0, "Longest wait for one reply, in seconds.", above=0, maximum=3600)
