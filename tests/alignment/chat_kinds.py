"""Chat templates in the kinds of the model families, written for the tests, and what is learnt with each.

In the expected texts, « and » stand around what the model has to write.
"""

# ruff: noqa: E501

import dataclasses
from typing import Any

HI = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "One"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Two"},
]
THOUGHT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "One", "reasoning_content": "Old idea"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Two", "reasoning_content": "New idea"},
]
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "call12345", "function": {"name": "time", "arguments": {"zone": "CET"}}}
CALLS = [
    {"role": "user", "content": "Hi", "tools": TOOLS},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"now": "12"}', "tool_call_id": "call12345"},
    {"role": "assistant", "content": "Noon"},
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of template.

    Attributes:
        template: Jinja source.
        special: its special tokens; the last one is the EOS.
        ordinary: its other added tokens.
        cases: conversation, expected text, number of turns without an end.
    """

    template: str
    special: tuple[str, ...]
    cases: tuple[tuple[list[dict[str, Any]], str, int], ...]
    ordinary: tuple[str, ...] = ()


KINDS = {
    "ChatML": Kind(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        (
            (
                HI,
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«One<|im_end|>»\n"
                "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«Two<|im_end|>»\n",
                0,
            ),
        ),
    ),
    # The empty block that the template writes into the last turn stands after the generation prompt: a model
    # that is asked with that prompt writes it.
    "Qwen 3": Kind(
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}<think>\n"
        "{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
        "<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
        "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        (
            (
                HI,
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«One<|im_end|>»\n<|im_start|>user\nMore<|im_end|>\n"
                "<|im_start|>assistant\n«<think>\n\n</think>\n\nTwo<|im_end|>»\n",
                0,
            ),
            (
                THOUGHT,
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«One<|im_end|>»\n<|im_start|>user\nMore<|im_end|>\n"
                "<|im_start|>assistant\n«<think>\nNew idea\n</think>\n\nTwo<|im_end|>»\n",
                0,
            ),
            (
                CALLS,
                '<|im_start|>system\n{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}\n'
                "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<tool_call>\n"
                '{"name": "time", "arguments": {"zone": "CET"}}\n</tool_call><|im_end|>»\n<|im_start|>user\n'
                '<tool_response>\n{"now": "12"}\n</tool_response><|im_end|>\n'
                "<|im_start|>assistant\n«<think>\n\n</think>\n\nNoon<|im_end|>»\n",
                0,
            ),
        ),
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    # The next turn's marker is the end; the last turn has none.
    "GLM 4": Kind(
        "[gMASK]<sop>{% if tools %}<|system|>\n{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}\n"
        "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n"
        "{% endfor %}</tool_call>{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}{# tojson #}",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        (
            (HI, "[gMASK]<sop><|user|>\nHi<|assistant|>\n«One<|user|>»\nMore<|assistant|>\n«Two»", 1),
            (
                CALLS,
                '[gMASK]<sop><|system|>\n{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}'
                "<|user|>\nHi<|assistant|>\n«<tool_call>time\n<arg_key>zone</arg_key>\n<arg_value>CET</arg_value>\n"
                '</tool_call><|observation|>»\n{"now": "12"}<|assistant|>\n«Noon»',
                1,
            ),
        ),
        ("<tool_call>", "</tool_call>"),
    ),
    # The prompt opens the thinking, which turns before the last one lose.
    "DeepSeek R1": Kind(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' and m.content is none %}<|Assistant|>{% for c in m.tool_calls %}"
        "<|call_begin|>{{ c.type + '<|sep|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}"
        "<|call_end|>{% endfor %}<|eos|>{% elif m.role == 'tool' %}<|out_begin|>{{ m.content }}<|out_end|>"
        "{% else %}{% if messages[loop.index0 - 1].role != 'tool' %}<|Assistant|>{% endif %}"
        "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}<|eos|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|Assistant|><think>\n{% endif %}",
        ("<|bos|>", "<|User|>", "<|Assistant|>", "<|call_begin|>", "<|sep|>", "<|call_end|>", "<|eos|>"),
        (
            (
                THOUGHT,
                "<|bos|><|User|>Hi<|Assistant|>«One<|eos|>»<|User|>More<|Assistant|><think>\n«New idea\n</think>\n\nTwo<|eos|>»",
                0,
            ),
            (
                [HI[0], *CALLS[1:]],
                '<|bos|><|User|>Hi<|Assistant|>«<|call_begin|>function<|sep|>time\n```json\n{"zone": "CET"}\n```<|call_end|><|eos|>»'
                '<|out_begin|>{"now": "12"}<|out_end|>«Noon<|eos|>»',
                0,
            ),
        ),
        ("<think>", "</think>"),
    ),
    # Channels, which the model opens itself; an answer ends otherwise than a thought or an older turn.
    "gpt-oss": Kind(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}<|start|>assistant to=functions."
        "{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}"
        "{% if loop.last and m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% endif %}{% elif m.role == 'tool' %}<|start|>functions.{{ messages[loop.index0 - 1].tool_calls[0].function.name }}"
        " to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>{% else %}"
        "{% if loop.first and tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
        "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"),
        (
            (
                THOUGHT,
                "<|start|>user<|message|>Hi<|end|><|start|>assistant«<|channel|>final<|message|>One<|end|>»"
                "<|start|>user<|message|>More<|end|><|start|>assistant«<|channel|>analysis<|message|>New idea<|end|>"
                "<|start|>assistant<|channel|>final<|message|>Two<|return|>»",
                0,
            ),
            (
                CALLS,
                '<|start|>developer<|message|>[{"type": "function", "function": {"name": "time", "parameters": '
                '{"type": "object"}}}]<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant« to=functions.time'
                '<|channel|>commentary json<|message|>{"zone": "CET"}<|call|>»<|start|>functions.time to=assistant'
                '<|channel|>commentary<|message|>"{\\"now\\": \\"12\\"}"<|end|><|start|>assistant«<|channel|>final'
                "<|message|>Noon<|return|>»",
                0,
            ),
        ),
    ),
    "Gemma 3": Kind(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        (
            (
                HI,
                "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«One<end_of_turn>»\n"
                "<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n«Two<end_of_turn>»\n",
                0,
            ),
        ),
    ),
    # JSON text as the result of a tool is written as JSON once more.
    "Llama 3.1": Kind(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}<|eot_id|>"
        "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one') }}{% endif %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
        "<|eot_id|>{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
        "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if loop.first and tools %}"
        "{{ tools | tojson }}\n\n{% endif %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        (
            (
                CALLS,
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 02 Jan 2030<|eot_id|>"
                '<|start_header_id|>user<|end_header_id|>\n\n[{"type": "function", "function": {"name": "time", "parameters": '
                '{"type": "object"}}}]\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«{"name": "time", '
                '"parameters": {"zone": "CET"}}<|eot_id|>»<|start_header_id|>ipython<|end_header_id|>\n\n'
                '"{\\"now\\": \\"12\\"}"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«Noon<|eot_id|>»',
                0,
            ),
        ),
    ),
    # The functions stand before the last message of a user, so no prefix of a conversation is rendered alike.
    "Mistral v3": Kind(
        "{{ bos_token }}{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] "
        "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {\"content\": {{ m.content }}}[/TOOL_RESULTS]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        (
            "<s>",
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "</s>",
        ),
        (
            (HI, "<s>[INST] Hi[/INST] «One</s>»[INST] More[/INST] «Two</s>»", 0),
            (
                [*CALLS, *HI[2:]],
                '<s>[INST] Hi[/INST]«[TOOL_CALLS] [{"name": "time", "arguments": {"zone": "CET"}, "id": "call12345"}]</s>»'
                '[TOOL_RESULTS] {"content": {"now": "12"}}[/TOOL_RESULTS] «Noon</s>»[AVAILABLE_TOOLS] '
                '[{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}][/AVAILABLE_TOOLS]'
                "[INST] More[/INST] «Two</s>»",
                0,
            ),
        ),
    ),
    "Phi 4": Kind(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        (
            (
                HI,
                "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>«One<|im_end|>»"
                "<|im_start|>user<|im_sep|>More<|im_end|><|im_start|>assistant<|im_sep|>«Two<|im_end|>»",
                0,
            ),
        ),
    ),
    "Command R": Kind(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
        "{{ '<|CHATBOT_TOKEN|>' if m.role == 'assistant' else '<|USER_TOKEN|>' }}{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>"
        "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        (
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<EOS_TOKEN>",
        ),
        (
            (
                HI,
                "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
                "<|CHATBOT_TOKEN|>«One<|END_OF_TURN_TOKEN|>»<|START_OF_TURN_TOKEN|><|USER_TOKEN|>More<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Two<|END_OF_TURN_TOKEN|>»",
                0,
            ),
        ),
    ),
    "Granite": Kind(
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        (
            (
                HI,
                "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
                "«One<|end_of_text|>»\n<|start_of_role|>user<|end_of_role|>More<|end_of_text|>\n"
                "<|start_of_role|>assistant<|end_of_role|>«Two<|end_of_text|>»\n",
                0,
            ),
        ),
    ),
    "Vicuna": Kind(
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ("<s>", "</s>"),
        ((HI, "USER: Hi ASSISTANT:« One</s>»USER: More ASSISTANT:« Two</s>»", 0),),
    ),
    # No marker at all.
    "questions and answers": Kind(
        "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}",
        ("<s>", "</s>"),
        ((HI, "Q: Hi\nA: «One»\nQ: More\nA: «Two»\n", 2),),
    ),
    # The end is text.
    "written end": Kind(
        "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### end\n{% endfor %}",
        ("<s>", "</s>"),
        (
            (
                HI,
                "### user\nHi\n### end\n### assistant\n«One\n### end»\n### user\nMore\n### end\n### assistant\n«Two\n### end»\n",
                2,
            ),
        ),
    ),
}
