// Replaces each static image with a live chart that can be zoomed, adds sorting and filtering to tables, and shows in the
// contents which section is read. Without this script the page shows the static images and the complete tables.
(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const config = read("config");

  const button = (text, label, press) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.title = label;
    made.addEventListener("click", press);
    return made;
  };
  const label = (text) => Object.assign(document.createElement("span"), { textContent: text });

  // Breaks a text into lines of at most this many letters; one line stays a text.
  const fold = (text, letters) => {
    const lines = [];
    for (const word of text.split(" ")) {
      const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
      if (lines.length && longer.length <= letters) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines.length > 1 ? lines : text;
  };
  const LETTER = 8.5; // width of a letter of a title, pixels
  const LABELS = 235; // width of the longest labels of a facet's rows, pixels
  // Fits a chart into a phone's width: parts below each other, and titles on several lines.
  const narrowed = (own, width) => {
    const letters = Math.floor(width / LETTER);
    const spec = JSON.parse(JSON.stringify(own), (key, value) => {
      if (key !== "title" || !value) return value;
      if (typeof value === "string") return fold(value, letters);
      return { ...value, text: fold(value.text, letters), ...(value.subtitle && { subtitle: fold(value.subtitle, letters) }) };
    });
    const { hconcat, ...rest } = spec;
    if (hconcat) return { ...rest, vconcat: hconcat };
    if (spec.facet) return { ...spec, columns: 1, spec: { ...spec.spec, width: Math.max(110, width - LABELS) } };
    return spec;
  };

  // Sets the ends of a timeline's axes, which are parameters of the chart, with buttons or by dragging with the mouse.
  const addZoom = (chart, view, { number, parts, ranges }) => {
    const bar = document.createElement("div");
    bar.className = "zoom";
    bar.setAttribute("role", "group");
    bar.setAttribute("aria-label", "Zoom");
    const get = (name) => view.signal(`${name}_${number}`);
    const marks = [];
    const mark = () => {
      for (const [shown, low, high, from, to] of marks) {
        shown.setAttribute("aria-pressed", String(get(low) === from && get(high) === to));
      }
    };
    const set = (low, high, from, to) => {
      view.signal(`${low}_${number}`, from).signal(`${high}_${number}`, to).run();
      mark();
    };
    const setStep = (from, to) => {
      const length = Math.min(1, Math.max(to - from, 0.005));
      const start = Math.min(Math.max(0, from), 1 - length);
      set("start", "end", start, start + length);
    };
    // Moves by a share of what is shown and shows a multiple of it.
    const change = (shift, factor) => () => {
      const length = get("end") - get("start");
      const middle = (get("start") + get("end")) / 2 + shift * length;
      setStep(middle - (factor * length) / 2, middle + (factor * length) / 2);
    };
    const choice = (low, high, { name, from, to }) => {
      const made = button(name, `Show ${name}`, () => set(low, high, from, to));
      marks.push([made, low, high, from, to]);
      return made;
    };
    const steps = [{ name: "all", from: 0, to: 1 }, ...parts];
    bar.append(label("Show"), ...steps.map((part) => choice("start", "end", part)));
    bar.append(button("+", "Zoom in", change(0, 0.5)), button("\u2212", "Zoom out", change(0, 2)));
    bar.append(button("\u2190", "Earlier", change(-0.5, 1)), button("\u2192", "Later", change(0.5, 1)));
    bar.append(label("Height"), ...ranges.map((range) => choice("bottom", "top", range)));
    chart.closest(".scroll").before(bar);
    mark();

    // Share of the step under the pointer.
    const place = (event) => {
      const drawn = chart.querySelector("svg").getBoundingClientRect();
      const x = (event.clientX - drawn.left - view.origin()[0]) / view.width();
      return get("start") + Math.min(1, Math.max(0, x)) * (get("end") - get("start"));
    };
    chart.addEventListener("pointerdown", (down) => {
      if (down.pointerType !== "mouse" || down.button !== 0) return;
      down.preventDefault();
      const band = Object.assign(document.createElement("div"), { className: "drag" });
      chart.append(band);
      const left = chart.getBoundingClientRect().left;
      const move = (event) => {
        band.style.left = `${Math.min(event.clientX, down.clientX) - left}px`;
        band.style.width = `${Math.abs(event.clientX - down.clientX)}px`;
      };
      const up = (event) => {
        removeEventListener("pointermove", move);
        removeEventListener("pointerup", up);
        band.remove();
        if (Math.abs(event.clientX - down.clientX) < 8) return;
        const ends = [place(down), place(event)];
        setStep(Math.min(...ends), Math.max(...ends));
      };
      addEventListener("pointermove", move);
      addEventListener("pointerup", up);
    });
  };

  for (const figure of document.querySelectorAll("figure[data-spec]")) {
    const still = figure.querySelector("img");
    const chart = document.createElement("div");
    chart.className = "chart";
    still.before(chart);
    const columns = Math.max(1, Math.floor(chart.clientWidth / 230));
    const drawn = read(figure.dataset.spec);
    const own = chart.clientWidth < 500 ? narrowed(drawn, chart.clientWidth) : drawn;
    if (own.facet && chart.clientWidth < 700) own.columns = 1;
    const width = { width: "container", autosize: { type: "fit-x", contains: "padding" } };
    const spec = figure.classList.contains("live") ? { ...own, ...width } : own;
    const options = {
      actions: false,
      ast: true, // Interpret expressions: the page's policy forbids eval.
      config: { ...config, legend: { ...config.legend, columns } },
      defaultStyle: false,
      renderer: "svg",
      tooltip: { disableDefaultStyle: true },
    };
    vegaEmbed(chart, spec, options).then(
      ({ view }) => {
        still.remove();
        if (own.usermeta?.zoom) addZoom(chart, view, own.usermeta.zoom);
      },
      (error) => {
        chart.remove();
        console.error(error);
      },
    );
  }

  const collator = new Intl.Collator("en", { numeric: true });
  const sortValue = (cell) => (cell.dataset.sortValue === undefined ? null : Number(cell.dataset.sortValue));
  // Numbers by value, then texts alphabetically; missing values stay last in both directions.
  const compare = (one, other, sign) => {
    const [a, b] = [sortValue(one), sortValue(other)];
    if (a !== null && b !== null) return sign * (a - b);
    if (a !== null || b !== null) return a === null ? 1 : -1;
    return sign * collator.compare(one.textContent, other.textContent);
  };

  const sort = (table, heading) => {
    const index = heading.cellIndex;
    const downwards = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", downwards ? "descending" : "ascending");
    const [body] = table.tBodies;
    const sign = downwards ? -1 : 1;
    body.append(...[...body.rows].sort((one, other) => compare(one.cells[index], other.cells[index], sign)));
  };

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    for (const heading of table.tHead.rows[0].cells) {
      const sorter = button("", "", () => sort(table, heading));
      sorter.removeAttribute("title");
      sorter.append(...heading.childNodes);
      heading.append(sorter);
    }
  }

  for (const table of document.querySelectorAll("table[data-chosen-by]")) {
    const index = Number(table.dataset.chosenBy);
    const rows = [...table.tBodies[0].rows];
    const name = table.tHead.rows[0].cells[index].textContent;
    const select = document.createElement("select");
    const values = new Set(rows.map((row) => row.cells[index].textContent));
    select.append(new Option(`every ${name}`, ""), ...[...values].map((value) => new Option(value)));
    const show = () => {
      for (const row of rows) row.hidden = select.value !== "" && row.cells[index].textContent !== select.value;
    };
    select.addEventListener("change", show);
    if (rows.length > 8 && values.size > 1) {
      [select.value] = values;
      show();
    }
    const choose = document.createElement("label");
    choose.className = "choose";
    choose.append(`Show ${name} `, select);
    table.parentElement.before(choose);
  }

  const contents = document.querySelector("nav details");
  if (contents) {
    const summary = contents.querySelector("summary");
    const here = label("");
    summary.append(here);
    const entries = [...contents.querySelectorAll("a")].map((link) => [
      link,
      document.getElementById(decodeURIComponent(link.hash.slice(1))),
    ]);
    const follow = () => {
      const edge = summary.getBoundingClientRect().bottom + 16;
      const begun = entries.filter(([, heading]) => heading.getBoundingClientRect().top <= edge);
      // A short last section never reaches the top.
      const end = scrollY > 0 && innerHeight + scrollY >= document.documentElement.scrollHeight - 1;
      const read = (end ? entries : begun).at(-1) ?? entries[0];
      for (const [link] of entries) link.removeAttribute("aria-current");
      read[0].setAttribute("aria-current", "true");
      here.textContent = read[0].textContent;
    };
    addEventListener("scroll", () => requestAnimationFrame(follow), { passive: true });
    follow();
    const close = () => {
      contents.open = false;
    };
    contents.addEventListener("click", (event) => event.target.closest("a") && close());
    document.addEventListener("click", (event) => contents.contains(event.target) || close());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && contents.open) {
        close();
        summary.focus();
      }
    });
  }
})();
