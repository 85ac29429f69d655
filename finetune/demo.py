"""A page for the browser: what a model writes after a prompt with 0 pauses, beside what it writes with M of them.

python finetune/demo.py --model_name_or_path runs/run/model
"""

import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from threading import Event

import gradio as gr
from starlette.middleware import Middleware

from finetune.arguments import ModelArguments
from finetune.comparison import Comparison, filled
from finetune.decoding import DecodingArguments
from finetune.generate import composed
from finetune.guard import Guard, timed
from finetune.setup import load_model
from kozero import distributed
from kozero.config import arg, parse_arguments
from kozero.errors import UserError, first_line, require, run_main
from kozero.pause import InferencePauseArguments

PAUSES = "num_inference_pauses"
ROWS = (  # numbers on the page by the names of their arguments, with a word about each
    {
        PAUSES: "M, 일시정지 수 · -1: 학습 때만큼",
        "max_new_tokens": "한 글의 최대 토큰 수",
        "temperature": "0: 늘 가장 그럴듯한 토큰",
        "seed": "같은 시드, 같은 글",
    },
    {
        "top_k": "후보 토큰 수 · 0: 전부",
        "top_p": "후보들의 확률의 합",
        "repetition_penalty": "1보다 크면 되풀이가 줄어듦",
        "no_repeat_ngram_size": "되풀이하지 않을 토큰 열 · 0: 제한 없음",
    },
)
TWICE = "같은 시드로 두 번: 일시정지 없이, 그리고 M개와 함께 · One seed, two texts: without pauses, with M of them"
ONCE = "이 모델에는 일시정지 토큰이 없습니다 · This model has no pause token"
READY = "준비 · ready"
PROMPT_CHARACTERS = 20_000  # more is no prompt, and would be tokenised to find that out
WAITING = 20  # readers who may wait for their turn
WRITING, DONE, STOPPED = "쓰는 중 · writing", "완료 · done", "멈췄습니다 · stopped"
NOTHING = "모델이 바로 글을 끝냈습니다 · the model ended the text at once"
FONTS = ("Pretendard", "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic", "NanumGothic", "system-ui", "sans-serif")


@dataclass
class DemoArguments:
    """Where the page is."""

    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine, for anyone who can reach it")
    port: int = arg(7860, "TCP port to listen on; 0: a free one")
    max_seconds: float = arg(300.0, "seconds after which the two texts of a reader end where they are")

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, f"--port {self.port}: must be from 0 to 65535")
        require(self.max_seconds > 0, f"--max_seconds {self.max_seconds}: must be above 0")


ARGUMENTS = (DemoArguments, ModelArguments, InferencePauseArguments, DecodingArguments)


def main() -> None:
    """Load once, then write for everyone who opens the page. Decoding arguments are what the page begins with."""
    arguments, model_arguments, pause_arguments, decoding = parse_arguments(
        *ARGUMENTS, prog="finetune/demo.py", description="Let a model write, with and without pauses, in the browser."
    )
    require(decoding.num_beams == 1, "--num_beams: the page shows one text as it is written; leave it out")
    port = checked_port(arguments.host, arguments.port)
    distributed.setup()
    model = load_model(model_arguments, pause_arguments, with_pauses=False, seed=decoding.seed)
    name = model_arguments.model_name_or_path or model_arguments.config_file
    blocks = page(Comparison(model, pause_arguments), decoding, name, arguments.max_seconds)
    address = launch(blocks, arguments.host, port)
    distributed.say(f"{address}  (Ctrl-C ends)")
    Event().wait()


def checked_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises: UserError when it is taken or the host is none of this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a demo that ended just now
            server.bind(address)
            return server.getsockname()[1]
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or "no address"
        raise UserError(f"--host {host} --port {port}: {told}; choose another (--port 0: a free one)") from None


def launch(blocks: gr.Blocks, host: str, port: int) -> str:
    """Serve a page to those who ask `host` for it, one after the other; nothing else is asked for anything. Returns its
    address."""
    blocks.queue(default_concurrency_limit=1, max_size=WAITING)
    guard = Middleware(Guard, host=host, num_values=len(blocks.fns[0].inputs) - 1)
    name = f"[{host.strip('[]')}]" if ":" in host else host  # Gradio wants IPv6 as it stands in an address
    try:
        _, address, _ = blocks.launch(
            server_name=name, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
            run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, show_error=False,
            app_kwargs={"middleware": [guard]},
            theme=gr.themes.Default(font=FONTS, font_mono=("monospace",)).set(block_info_text_color="*neutral_500"),
        )  # fmt: skip
    except OSError as error:  # taken since it was looked at
        raise UserError(f"--host {host} --port {port}: {first_line(error)}; choose another") from None
    config = blocks.server.config  # it is asked for the protocol of each connection
    config.http_protocol_class = timed(config.http_protocol_class)
    return address


def page(comparison: Comparison, decoding: DecodingArguments, name: str, max_seconds: float = 300.0) -> gr.Blocks:
    """Prompt, the two texts, settings, and a line that tells what is going on."""
    pausing = comparison.can_pause
    with gr.Blocks(title="KoZeRO", analytics_enabled=False) as blocks:
        gr.Markdown(f"### KoZeRO · {name}\n{TWICE if pausing else ONCE}")
        prompt = gr.Textbox(
            label="프롬프트 · prompt", lines=2, autofocus=True, elem_id="prompt", max_length=PROMPT_CHARACTERS
        )
        with gr.Row():
            go = gr.Button("쓰기 · Generate", variant="primary", elem_id="go")
            cancel = gr.Button("멈추기 · Cancel", elem_id="cancel")
        message = gr.Textbox(READY, show_label=False, container=False, interactive=False, elem_id="message")
        with gr.Row():
            plain = gr.Textbox(label="일시정지 0개 · 0 pauses", lines=6, elem_id="plain")
            paused = gr.Textbox(label="일시정지 M개 · M pauses", lines=6, elem_id="paused", visible=pausing)
        values = {PAUSES: comparison.num_pauses} | asdict(decoding)
        fields = {}
        for row in ROWS:
            with gr.Row():
                for key, told in row.items():
                    shown = pausing or key != PAUSES
                    fields[key] = gr.Number(values[key], label=key, info=told, visible=shown, elem_id=key)

        def show(prompt: str | None, *numbers: float | None) -> Iterator[tuple[str, str, str]]:
            told = dict(zip(fields, numbers, strict=True))
            yield from answers(comparison, decoding, prompt or "", told, max_seconds)

        inputs, outputs = [prompt, *fields.values()], [plain, paused, message]
        writing = gr.on(
            [go.click, prompt.submit], show, inputs, outputs,
            api_name="write", show_progress="minimal", show_progress_on=[message],
        )  # fmt: skip
        cancel.click(None, cancels=[writing])
        # Not by the button itself: what was on its way to the page when it was pressed would come after it.
        writing.failure(None, None, message, js=f"() => {STOPPED!r}", api_visibility="private")
    return blocks


def answers(
    comparison: Comparison,
    decoding: DecodingArguments,
    prompt: str,
    numbers: Mapping[str, float | None],
    max_seconds: float = 300.0,
) -> Iterator[tuple[str, str, str]]:
    """The two texts so far, and what is going on or wrong; `numbers` are those of the page by argument."""
    plain = paused = ""
    end = time.monotonic() + max_seconds
    try:
        require(len(prompt) <= PROMPT_CHARACTERS, f"--prompt: more than {PROMPT_CHARACTERS:,} characters; shorten it")
        pauses = filled(comparison.pause_arguments, {PAUSES: numbers[PAUSES]})
        decoding = filled(decoding, {key: value for key, value in numbers.items() if key != PAUSES})
        for plain, paused in comparison.write(composed(prompt), pauses, decoding):
            yield plain, paused, WRITING
            require(time.monotonic() < end, f"--max_seconds {max_seconds:g}: the texts end here; ask for fewer tokens")
        yield plain, paused, DONE if plain or paused else NOTHING
    except UserError as error:
        yield plain, paused, f"⚠ {error}"
    except RuntimeError as error:  # of PyTorch: memory, or probabilities that are none
        yield plain, paused, f"⚠ {first_line(error)}"


if __name__ == "__main__":
    run_main(main)
