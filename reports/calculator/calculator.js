// Requests costs and plan whenever the form changes. Without this script, the form's button loads the page again.
(() => {
  "use strict";
  const PAUSE_MS = 150; // Wait for the user to stop typing.
  const form = document.getElementById("choice");
  const answer = document.getElementById("answer");
  const status = document.getElementById("status");
  let asking = new AbortController();
  let timer = 0;
  document.documentElement.classList.add("live");

  const later = (ms, signal) =>
    new Promise((resolve, reject) => {
      const wait = setTimeout(resolve, ms);
      signal.addEventListener("abort", () => {
        clearTimeout(wait);
        reject(signal.reason);
      });
    });

  const announce = (text) => {
    if (status.textContent !== text) status.textContent = text;
  };

  // Only values that differ from the default; the server fills in the rest.
  const formQuery = () => {
    const pairs = new URLSearchParams();
    for (const field of form.elements) {
      if (!field.name) continue;
      const value = field.type === "checkbox" ? (field.checked ? field.value : "") : field.value.trim();
      if (value !== field.dataset.default && value !== "") pairs.append(field.name, value);
    }
    return pairs.size ? `?${pairs}` : "";
  };

  const showError = (error) => {
    for (const field of form.elements) {
      if (!field.name) continue;
      const bad = error !== null && error.field === field.name;
      if (bad) {
        field.setAttribute("aria-invalid", "true");
        field.closest("details")?.setAttribute("open", "");
      } else field.removeAttribute("aria-invalid");
      document.getElementById(`error-${field.name}`).textContent = bad ? error.message : "";
    }
  };

  // Replaces content; keeps expanded sections and the focus.
  const replace = (change) => {
    const folds = new Map([...answer.querySelectorAll("details[id]")].map((one) => [one.id, one.open]));
    const held = document.activeElement?.closest?.("#answer [id]")?.id;
    change();
    for (const one of answer.querySelectorAll("details[id]")) {
      if (folds.has(one.id)) one.open = folds.get(one.id);
    }
    if (held && !answer.contains(document.activeElement)) {
      const again = document.getElementById(held);
      (again?.matches("[tabindex]") ? again : again?.querySelector("summary, [tabindex]") ?? answer).focus({ preventScroll: true });
    }
  };

  const fail = async (response) => {
    let error = { field: null, message: `the server responded with status ${response.status}` };
    try {
      error = (await response.json()).error;
    } catch {
      // The response is not from the calculator, so it has no JSON error.
    }
    showError(error);
    announce(error.message);
    answer.classList.add("stale");
  };

  // Polls the search; the server holds each request for several seconds.
  const follow = async (query, signal) => {
    for (;;) {
      const plan = document.getElementById("plan");
      announce(plan.dataset.status);
      if (plan.dataset.state !== "searching" && plan.dataset.state !== "busy") return;
      if (plan.dataset.state === "busy") await later(2000, signal);
      const response = await fetch(`plan${query}`, { signal });
      if (response.status === 503) {
        announce((await response.json()).error.message);
        await later(1000 * Number(response.headers.get("Retry-After") ?? 2), signal);
        continue;
      }
      if (!response.ok) {
        document.getElementById("plan").dataset.state = "refused";
        return fail(response);
      }
      const html = await response.text();
      replace(() => (document.getElementById("plan").outerHTML = html));
    }
  };

  const guarded = async (work) => {
    try {
      await work();
    } catch (error) {
      if (error.name !== "AbortError") {
        announce("The server does not respond.");
        answer.classList.add("stale");
      }
    }
  };

  const ask = () => {
    asking.abort();
    asking = new AbortController();
    const { signal } = asking;
    const query = formQuery();
    history.replaceState(null, "", query || location.pathname);
    answer.classList.add("stale");
    return guarded(async () => {
      const response = await fetch(`answer${query}`, { signal });
      if (!response.ok) return fail(response);
      const html = await response.text();
      showError(null);
      replace(() => (answer.innerHTML = html));
      answer.classList.remove("stale");
      await follow(query, signal);
    });
  };

  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, PAUSE_MS);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    ask();
  });
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      announce("Copied.");
    } catch {
      getSelection().selectAllChildren(source);
      announce("Selected. Copy with the keyboard.");
    }
  });
  if (document.getElementById("plan")) guarded(() => follow(location.search, asking.signal));
})();
