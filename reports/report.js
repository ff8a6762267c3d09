// Puts a live chart in the place of each still picture. Without this script the pictures remain.
(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const config = read("config");
  for (const figure of document.querySelectorAll("figure[data-spec]")) {
    const still = figure.querySelector("img");
    const live = document.createElement("div");
    live.className = "live";
    still.before(live);
    const columns = Math.max(1, Math.floor(live.clientWidth / 230));
    const spec = { ...read(figure.dataset.spec), width: "container", autosize: { type: "fit-x", contains: "padding" } };
    const options = {
      actions: false,
      ast: true, // No code is made from text, so the page's policy need not allow it.
      config: { ...config, legend: { ...config.legend, columns } },
      defaultStyle: false,
      renderer: "svg",
      tooltip: { disableDefaultStyle: true },
    };
    vegaEmbed(live, spec, options).then(
      () => still.remove(),
      (error) => {
        live.remove();
        console.error(error);
      },
    );
  }
})();
