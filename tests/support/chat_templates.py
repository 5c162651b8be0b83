"""Chat templates in the shape of the families that models have, and the marks that their tokenizers know."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MARKS", "REWRITES", "TEMPLATES", "TRIMS"]

_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_LAST = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_THINKER = (
    _LAST
    + "{% for m in messages %}{% set said = m['content'] %}{% set thought = m['reasoning_content'] or '' %}"
    + "{% if m['role'] == 'assistant' and '</think>' in said %}"
    + "{% set thought = said.split('</think>')[0].replace('<think>', '') %}"
    + "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    + "{{ '<|im_start|>' + m['role'] + '\n' }}"
    + "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    + "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    + "{{ said + '<|im_end|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)

TEMPLATES: Mapping[str, str] = {
    "chatml": "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK,
    "chatml-default-system": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help with moss.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (head if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # The system message stands in the last question, so that earlier prompts change as the conversation goes on.
    "mistral": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.index0 == ns.last and messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
        "{% set who = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + who + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "r1": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
        "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
    "qwen3": (
        _THINKER
        + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        + "{% endif %}"
    ),
    "qwen3-thinking": _THINKER + "{{ '<think>\n' }}{% endif %}",
    "neox": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% else %}{{ ('Q: ' if m['role'] == 'user' else 'A: ') + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    ),
    "command-r": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN|>' }}"
        "{{ {'system': '<|SYSTEM|>', 'user': '<|USER|>', 'assistant': '<|BOT|>'}[m['role']] }}"
        "{{ m['content'] + '<|END_OF_TURN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN|><|BOT|>' }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
        "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # No end behind an answer: the end token is put there by whoever trains.
    "alpaca": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Task:\n' + m['content'] + '\n\n' }}"
        "{% else %}{{ '### Reply:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Reply:\n' }}{% endif %}"
    ),
}

REWRITES = {"mistral", "qwen3", "qwen3-thinking"}
"""Those that write earlier turns of a conversation with a system message otherwise once it goes on."""

TRIMS = {"llama-2", "llama-3", "gemma"}
"""Those that leave out blanks around a content."""

MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|User|>",
    "<|Assistant|>",
    "<think>",
    "</think>",
    "<|START_OF_TURN|>",
    "<|END_OF_TURN|>",
    "<|SYSTEM|>",
    "<|USER|>",
    "<|BOT|>",
)
