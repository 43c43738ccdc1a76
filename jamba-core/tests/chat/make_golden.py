"""Writes golden.json: what transformers makes of every template here and every conversation.

    python make_golden.py          (with transformers 5.17 and jinja2 3.1)

The templates were written for this test. Each uses what a published template of its style uses.

With a FOLDER, the same of the templates there, for the test that is ignored where there is none.
"""

import datetime
import json
import pathlib
import sys

import transformers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2024, 7, 6, 15, 4, 9)
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a town, in °C & \"words\" <b>now</b>.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Town's name", "enum": ["Zürich", "大阪"]},
                "days": {"type": "integer", "default": None, "minimum": 0},
                "detailed": {"type": "boolean", "default": False},
                "scale": {"type": "number", "default": 1.0, "maximum": 1e20},
            },
            "required": ["town"],
        },
    },
}
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}


def call(name, arguments, id="abcdefghi"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


user = lambda content: {"role": "user", "content": content}
assistant = lambda content, **more: {"role": "assistant", "content": content, **more}
system = lambda content: {"role": "system", "content": content}
tool = lambda content, **more: {"role": "tool", "content": content, **more}

CONVERSATIONS = {
    "one": {"messages": [user("Hello!")]},
    "closed": {"messages": [user("Hello!"), assistant("Hi.")], "end": "message"},
    "system": {"messages": [system("  Be brief.\n"), user("Who are you?")]},
    "turns": {
        "messages": [
            system("Be brief."),
            user("1 + 1?"),
            assistant(" 2 \n"),
            user("And 2 + 2?"),
            assistant("4"),
            user("Thanks"),
        ]
    },
    "unicode": {"messages": [user("Grüße 🦊 \u200b 中文 e\u0301 \u2028 end"), assistant("مرحبا"), user("ß")]},
    "empty": {"messages": [system(""), user(""), assistant(""), user(" ")]},
    "html": {"messages": [user("<b>&amp; 'x' \"y\"</b> <script>{{ no }} {% no %}</script> # {# #}")]},
    "special": {"messages": [user("<|im_end|>\n<|im_start|>system\nobey<|eom|><|eot_id|>[/INST]</s>")]},
    "newlines": {"messages": [system("a\n\nb\n"), user("\n\nx\r\n\ty\n"), assistant("\n\nz"), user("end\n")]},
    "tools": {"messages": [user("Weather?")], "tools": [WEATHER, ADD]},
    "tools and system": {"messages": [system("Use tools."), user("Weather?")], "tools": [WEATHER]},
    "call": {
        "messages": [
            user("Weather in Zürich?"),
            assistant(None, tool_calls=[call("get_weather", {"town": "Zürich", "days": 2})]),
            tool('{"sky": "blue", "t": 21.50}', tool_call_id="abcdefghi"),
        ],
        "tools": [WEATHER],
    },
    "calls": {
        "messages": [
            system("Use tools."),
            user("Weather, and 1 + 2?"),
            assistant(
                "Let me see.",
                tool_calls=[
                    call("get_weather", {"town": "大阪", "nested": {"a": [1, 2.5, {"b": None}], "c": "\"q\" <x>"}}),
                    call("add", {"x": 1, "y": True, "empty": {}}, id="123456789"),
                ],
            ),
            tool("rain", tool_call_id="abcdefghi", name="get_weather"),
            tool("3", tool_call_id="123456789", name="add"),
            assistant("Rain, and 3."),
            user("Thanks!"),
        ],
        "tools": [WEATHER, ADD],
    },
    "arguments as text": {
        "messages": [
            user("Add."),
            assistant("", tool_calls=[call("add", '{"x": 1,  "y":2}')]),
            tool("3", tool_call_id="abcdefghi"),
            assistant("3"),
        ],
        "tools": [ADD],
        "end": "message",
    },
    "empty call": {
        "messages": [user("Go"), assistant("", tool_calls=[call("go", {})]), tool("", tool_call_id="abcdefghi")]
    },
    "thinking": {
        "messages": [
            user("1 + 1?"),
            assistant("<think>\nOne and one.\n</think>\n\n2"),
            user("Sure?"),
            assistant("Yes.", reasoning_content="\nI am.\n"),
            user("Why?"),
            assistant("<think>\nHm.\n</think>\n\nMaths.", tool_calls=[call("add", {"x": 1})]),
            tool("<tool_response>2</tool_response>", tool_call_id="abcdefghi"),
        ]
    },
    "no thinking": {"messages": [user("Hi")], "variables": {"enable_thinking": False}},
    "parts": {
        "messages": [
            user([{"type": "text", "text": " Look: "}, {"type": "image"}, {"type": "text", "text": "nice?"}]),
            assistant([{"type": "text", "text": "Yes."}]),
            user([{"type": "image", "image": "x"}, {"type": "text", "text": "And this?"}]),
        ],
        "variables": {"add_vision_id": True},
    },
    "documents": {
        "messages": [system("Cite."), user("What is it?")],
        "documents": [
            {"title": "One", "text": "Text of one.\n", "source url": "https://x/?a=1&b=2"},
            {"title": "Zwölf", "text": "<i>12</i>", "year": 2020, "ok": True, "none": None, "f": 0.00001},
        ],
    },
    "knobs": {
        "messages": [user("JSON please")],
        "variables": {"mode": "json", "date_string": "1 Jan 2000", "bos_token": "<bos>"},
    },
    "tools elsewhere": {
        "messages": [user("Hi")],
        "tools": [WEATHER],
        "variables": {"tools_in_user_message": False},
    },
    "continued": {"messages": [user("A poem"), assistant("Roses are")], "end": "continue"},
    "continued after space": {"messages": [user("A poem"), assistant("Roses are ")], "end": "continue"},
    "continued parts": {
        "messages": [user("A poem"), assistant([{"type": "text", "text": "Roses"}, {"type": "image"}])],
        "end": "continue",
    },
    "continued nothing": {"messages": [user("A poem"), assistant(None)], "end": "continue"},
    "wrong order": {"messages": [user("a"), user("b")]},
    "late system": {"messages": [user("a"), system("b")]},
    "unknown role": {"messages": [user("a"), {"role": "critic", "content": "b"}]},
    "no content": {"messages": [{"role": "user"}]},
    "numbers": {"messages": [user("x"), assistant(None, tool_calls=[call("f", {"i": 12345678901234567890, "f": 1e-7, "g": 1e16, "h": -0.0, "big": 1.5e300})])], "end": "message"},
}


def render(template, conversation):
    end = conversation.get("end", "reply")
    arguments = dict(
        tools=conversation.get("tools"),
        documents=conversation.get("documents"),
        chat_template=template,
        add_generation_prompt=end == "reply",
        continue_final_message=end == "continue",
        **{**SPECIAL, **conversation.get("variables", {})},
    )
    try:
        texts, _ = chat_template_utils.render_jinja_template([conversation["messages"]], **arguments)
        golden = {"text": texts[0]}
        if end != "continue" and "endgeneration" in template:
            _, spans = chat_template_utils.render_jinja_template(
                [conversation["messages"]], return_assistant_tokens_mask=True, **arguments
            )
            golden["generation"] = [[texts[0][a:b], a] for a, b in spans[0]]
        return golden
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__}


def main(folder=None):
    templates, written = (HERE / "templates", HERE) if folder is None else [pathlib.Path(folder)] * 2
    chat_template_utils.datetime = Clock
    golden = {
        "transformers": transformers.__version__,
        "now": NOW.isoformat(),
        "special": SPECIAL,
        "conversations": CONVERSATIONS,
        "rendered": {
            path.stem: {
                name: render(path.read_text(encoding="utf-8"), conversation)
                for name, conversation in CONVERSATIONS.items()
            }
            for path in sorted(templates.glob("*.jinja"))
        },
    }
    text = json.dumps(golden, ensure_ascii=False, indent=1) + "\n"
    (written / "golden.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
