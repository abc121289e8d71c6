"use strict";
(() => {
  const root = document.documentElement;
  const store = (() => { try { return window.localStorage; } catch { return null; } })();
  const button = document.getElementById("theme");
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : window.matchMedia("(prefers-color-scheme: dark)").matches;
  const showTheme = () => {
    button.textContent = isDark() ? "Light colors" : "Dark colors";
  };
  const saved = store && store.getItem("blipfit-theme");
  if (saved === "light" || saved === "dark") root.dataset.theme = saved;
  if (button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      if (store) store.setItem("blipfit-theme", root.dataset.theme);
      showTheme();
    });
    showTheme();
  }

  for (const form of document.querySelectorAll("form.curves")) {
    form.hidden = false;
    const section = form.parentElement;
    form.elements.experiment.addEventListener("change", (event) => {
      for (const line of section.querySelectorAll("svg [data-experiment]")) {
        const isSelected = line.dataset.experiment === event.target.value;
        line.classList.toggle("selected", isSelected);
        if (isSelected) line.parentElement.append(line);
      }
    });
  }

  const has = (list, value) => list.split(" ").includes(value);
  for (const form of document.querySelectorAll("form.examples-filter")) {
    form.hidden = false;
    const cards = [...form.parentElement.querySelectorAll(".example")];
    const status = form.querySelector("output");
    const update = () => {
      const experiment = form.elements.experiment.value;
      const group = form.elements.group ? form.elements.group.value : "";
      const outcome = form.elements.outcome.value;
      let count = 0;
      for (const card of cards) {
        const { right, wrong } = card.dataset;
        const some = (list) => experiment === "" ? list !== "" : has(list, experiment);
        const matches = (group === "" || card.dataset.group === group)
          && (experiment === "" || has(right, experiment) || has(wrong, experiment))
          && (outcome === "" || (outcome === "right" && some(right) && (experiment !== "" || wrong === ""))
            || (outcome === "wrong" && some(wrong) && (experiment !== "" || right === ""))
            || (outcome === "disputed" && right !== "" && wrong !== ""));
        card.hidden = !matches;
        if (matches) count += 1;
        for (const item of card.querySelectorAll("li")) {
          item.classList.toggle("selected", experiment !== "" && has(item.dataset.by, experiment));
        }
      }
      status.textContent = `${count} of ${cards.length} questions`;
    };
    form.addEventListener("change", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    update();
  }

  const opened = [];
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      opened.push(details);
    }
  });
  window.addEventListener("afterprint", () => {
    for (const details of opened.splice(0)) details.open = false;
  });

  if (root.dataset.watched === undefined) return;
  let version = null;
  window.setInterval(async () => {
    try {
      const answer = await (await fetch("/version", { cache: "no-store" })).text();
      if (version !== null && answer !== version) window.location.reload();
      version = answer;
    } catch { /* the server has stopped: the page stays as it is */ }
  }, 2000);
})();
