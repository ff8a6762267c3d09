// Requests verdict, plan and costs whenever the choice changes. Without this script, the form's button loads the page.
(() => {
  "use strict";
  const PAUSE_MS = 150; // Wait for the user to stop typing.
  const form = document.getElementById("choice");
  const answer = document.getElementById("answer");
  const status = document.getElementById("status");
  const verdict = () => document.getElementById("verdict");
  let asking = new AbortController();
  let timer = 0;
  let asked = location.search;
  let typedIn = null; // The field that made the last entry of the history, while its user types.
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
    status.classList.toggle("quiet", text === verdict().dataset.status);
  };

  const fade = (on) => {
    for (const part of [verdict(), answer]) part.classList.toggle("stale", on);
  };

  const fields = () => [...form.elements].filter((field) => field.name);

  // Only values that differ from the default; the server fills in the rest.
  const formQuery = () => {
    const pairs = new URLSearchParams();
    for (const field of fields()) {
      const value = field.type === "checkbox" ? (field.checked ? field.value : "") : field.value.trim();
      if (!field.disabled && value !== field.dataset.default && value !== "") pairs.append(field.name, value);
    }
    return pairs.size ? `?${pairs}` : "";
  };

  // A pasted text takes the place of some fields.
  const disable = () => {
    for (const text of form.querySelectorAll("[data-instead]")) {
      for (const name of text.dataset.instead.split(" ")) form.elements[name].disabled = text.value.trim() !== "";
    }
  };

  const fill = (query) => {
    const pairs = new URLSearchParams(query);
    for (const field of fields()) {
      const value = pairs.get(field.name) ?? field.dataset.default;
      if (field.type === "checkbox") field.checked = value === field.value;
      else {
        if (field.tagName === "SELECT" && ![...field.options].some((one) => one.value === value)) field.add(new Option(value, value));
        field.value = value;
      }
    }
    disable();
  };

  const showError = (error) => {
    for (const field of fields()) {
      const bad = error !== null && error.field === field.name;
      if (bad) {
        field.setAttribute("aria-invalid", "true");
        field.disabled = false;
        field.closest("details")?.setAttribute("open", "");
      } else field.removeAttribute("aria-invalid");
      const line = document.getElementById(`error-${field.name}`);
      if (line) line.textContent = bad ? error.message : "";
    }
  };

  // Replaces verdict and answer; keeps expanded sections and the focus.
  const show = (html) => {
    const folds = new Map([...answer.querySelectorAll("details[id]")].map((one) => [one.id, one.open]));
    const held = document.activeElement?.closest?.("#answer [id], #verdict [id]")?.id;
    const made = document.createElement("template");
    made.innerHTML = html;
    verdict().replaceWith(made.content.querySelector("#verdict"));
    answer.replaceChildren(made.content);
    for (const one of answer.querySelectorAll("details[id]")) {
      if (folds.has(one.id)) one.open = folds.get(one.id);
    }
    fade(false);
    if (held && document.activeElement === document.body) {
      const again = document.getElementById(held);
      (again?.matches("a, button, [tabindex]") ? again : again?.querySelector("summary, [tabindex]") ?? answer).focus({ preventScroll: true });
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
    fade(true);
  };

  // Polls the search; the server holds each request for several seconds.
  const follow = async (query, signal) => {
    for (;;) {
      announce(verdict().dataset.status);
      const { state } = verdict().dataset;
      if (state !== "searching" && state !== "busy") return;
      if (state === "busy") await later(2000, signal);
      const response = await fetch(`plan${query}`, { signal });
      if (response.status === 503) {
        announce((await response.json()).error.message);
        await later(1000 * Number(response.headers.get("Retry-After") ?? 2), signal);
        continue;
      }
      if (!response.ok) return fail(response);
      show(await response.text());
    }
  };

  const guarded = async (work) => {
    try {
      await work();
    } catch (error) {
      if (error.name !== "AbortError") {
        announce("The server does not respond.");
        fade(true);
      }
    }
  };

  const load = (query) => {
    clearTimeout(timer);
    asking.abort();
    asking = new AbortController();
    const { signal } = asking;
    asked = query;
    fade(true);
    return guarded(async () => {
      const response = await fetch(`answer${query}`, { signal });
      if (!response.ok) return fail(response);
      const html = await response.text();
      showError(null);
      disable();
      show(html);
      await follow(query, signal);
    });
  };

  // Every choice is an entry of the history; while one types into a field, its values share an entry.
  const visit = (query, field = null) => {
    if (query === asked) return;
    history[field !== null && field === typedIn ? "replaceState" : "pushState"](null, "", query || location.pathname);
    typedIn = field;
    load(query);
  };

  const edited = (event) => {
    clearTimeout(timer);
    disable();
    const field = event.target;
    const typed = field.matches("textarea, input:not([type=checkbox])");
    if (event.type === "input" && typed) {
      timer = setTimeout(() => visit(formQuery(), field), PAUSE_MS);
      return;
    }
    visit(formQuery(), typed ? field : null);
    typedIn = null;
  };
  form.addEventListener("input", edited);
  form.addEventListener("change", edited);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const query = formQuery();
    if (query === asked) load(query);
    else visit(query);
  });
  addEventListener("popstate", () => {
    typedIn = null;
    if (location.search === asked) return;
    fill(location.search);
    load(location.search);
  });

  // A dropped file is the text of the model, if it names a family, or of the cluster.
  const drop = async (file) => {
    const most = form.elements.model_yaml.maxLength;
    const text = file.size > 4 * most ? "" : await file.text();
    if (text === "" || text.length > most) {
      announce(`${file.name}: must be a text of at most ${most.toLocaleString("en")} characters`);
      return;
    }
    const field = form.elements[/^[\s{]*"?family"?\s*:/m.test(text) ? "model_yaml" : "cluster_yaml"];
    field.closest("details").open = true;
    field.value = text;
    field.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const holdsFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => holdsFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!holdsFile(event)) return;
    event.preventDefault();
    drop(event.dataTransfer.files[0]);
  });

  const copy = async (button) => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      announce("Copied.");
    } catch {
      getSelection().selectAllChildren(source);
      announce("Selected. Copy with the keyboard.");
    }
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (button) copy(button);
    const link = event.target.closest("a[data-choice]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const { search } = new URL(link.getAttribute("href"), location.href);
    fill(search);
    visit(search);
    typedIn = null;
  });
  if (document.getElementById("plan")) guarded(() => follow(location.search, asking.signal));
})();
