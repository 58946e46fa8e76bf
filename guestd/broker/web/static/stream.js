// The broker's stream: found again by itself whenever it is lost.

const RETRY_MS = 1000;
const SILENCE_MS = 25000; // it beats every 10 s

export function follow(state, onLink) {
  let source = null;
  let silence = 0;
  let retry = 0;

  const alive = () => {
    clearTimeout(silence);
    silence = setTimeout(lost, SILENCE_MS);
  };

  function lost() {
    source?.close();
    source = null;
    clearTimeout(silence);
    clearTimeout(retry);
    onLink("lost");
    retry = setTimeout(open, RETRY_MS);
  }

  function open() {
    source = new EventSource("/api/stream");
    source.addEventListener("snapshot", (event) => {
      alive();
      state.snapshot(JSON.parse(event.data));
      onLink("live");
    });
    source.addEventListener("change", (event) => {
      alive();
      state.change(JSON.parse(event.data));
    });
    source.addEventListener("beat", alive);
    source.onerror = lost;
    alive();
  }

  addEventListener("pagehide", () => source?.close());
  addEventListener("pageshow", (event) => event.persisted && lost());
  open();
}
