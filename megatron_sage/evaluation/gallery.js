"use strict";
// The gallery: one card for each prompt and sample. Texts enter the page as textContent only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const number = (value, signed) => {
    if (value === null) return "–";
    const text = Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(3);
    return (signed && value > 0 ? "+" : "") + (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−"));
  };
  // What is shown as zero has no colour.
  const kind = (value) => (value >= 0.0005 ? "up-text" : value <= -0.0005 ? "down-text" : "");
  const single = data.checkpoints.length === 1;

  for (const name of data.columns) find("column").append(new Option(name));
  data.checkpoints.slice(single ? 0 : 1).forEach((name, k) => find("checkpoint").append(new Option(name, k + (single ? 0 : 1))));
  if (single) for (const id of ["order", "show"]) find(id).closest("label").hidden = true;

  // Score of the chosen checkpoint minus the first one's; null where either is unknown.
  const change = (row, checkpoint, column) => {
    const here = row.videos[checkpoint].scores[column], there = row.videos[0].scores[column];
    return here === null || there === null || checkpoint === 0 ? null : here - there;
  };

  const loader = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const card = entry.target;
      card.dataset.visible = entry.isIntersecting ? "yes" : "";
      for (const video of card.querySelectorAll("video")) {
        if (entry.isIntersecting && !video.src) video.src = video.dataset.src;
        else if (!entry.isIntersecting) video.pause();
      }
      if (entry.isIntersecting && playing) play(card);
    }
  }, { rootMargin: "200px" });

  let playing = false;
  const videos = (card) => [...card.querySelectorAll("video")];
  // A row plays together: all from the time of its first video.
  function play(card) {
    const all = videos(card), time = all.length ? all[0].currentTime : 0;
    for (const video of all) {
      if (Math.abs(video.currentTime - time) > 0.04) video.currentTime = time;
      video.play().catch(() => {}); // a pause may come first
    }
  }
  const pause = (card) => videos(card).forEach((video) => video.pause());
  const shownCards = () => cards.filter((card) => card.element.isConnected && card.element.dataset.visible);

  function build(row) {
    const card = make("article", "card row"), top = make("div", "top"), prompt = make("p", "prompt");
    const label = data.samples > 1 ? `${row.number}.${row.sample}` : `${row.number}`;
    prompt.append(make("span", "number", `${label} `), document.createTextNode(row.prompt));
    const badge = make("p", "change");
    top.append(prompt, badge);
    const strip = make("div", "videos");
    row.videos.forEach((entry, k) => {
      const figure = make("figure"), caption = make("figcaption");
      if (entry.file) {
        const video = make("video");
        Object.assign(video, { loop: true, muted: true, playsInline: true, preload: "auto", tabIndex: 0 });
        video.dataset.src = entry.file;
        video.setAttribute("aria-label", `${data.checkpoints[k]}: ${row.prompt}`);
        const toggle = () => (video.paused ? play(card) : pause(card));
        video.addEventListener("click", toggle);
        video.addEventListener("keydown", (event) => {
          if (event.key === " " || event.key === "Enter") { event.preventDefault(); toggle(); }
        });
        video.addEventListener("error", () => video.replaceWith(make("div", "missing", `${entry.file} cannot be played`)));
        figure.append(video);
      } else figure.append(make("div", "missing", "not finite: no video"));
      caption.append(make("b", "", data.checkpoints[k]));
      data.columns.forEach((name, column) => {
        const score = make("span", "", `${name} ${number(entry.scores[column])}`);
        const difference = change(row, k, column);
        if (difference !== null) score.append(make("span", kind(difference), ` ${number(difference, true)}`));
        caption.append(score);
      });
      figure.append(caption);
      strip.append(figure);
    });
    card.append(top, strip);
    return { row, element: card, badge };
  }

  const cards = data.rows.map(build);
  cards.forEach((card) => loader.observe(card.element));

  function arrange() {
    const column = find("column").selectedIndex, checkpoint = Number(find("checkpoint").value);
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const show = find("show").value, order = find("order").value;
    for (const card of cards) {
      const value = (card.value = change(card.row, checkpoint, column));
      card.badge.textContent = value === null ? "" : `${find("column").value} ${number(value, true)}`;
      card.badge.className = `change ${kind(value)}`;
    }
    const wanted = cards.filter(({ row, value }) => {
      const text = row.prompt.toLowerCase();
      const fits = { all: true, better: value > 0, worse: value < 0, equal: value === 0 }[show];
      return fits && words.every((word) => text.includes(word)) && !(show !== "all" && value === null);
    });
    const sign = order === "gain" ? -1 : 1;
    // Unknown differences come last in either order.
    if (order !== "prompt") wanted.sort((a, b) => (a.value === null) - (b.value === null) || sign * (a.value - b.value));
    find("rows").replaceChildren(...wanted.map((card) => card.element));
    find("count").textContent = `${wanted.length} of ${cards.length}`;
  }

  for (const id of ["column", "checkpoint", "order", "show"]) find(id).addEventListener("change", arrange);
  find("search").addEventListener("input", arrange);
  find("play").addEventListener("click", () => {
    playing = !playing;
    find("play").textContent = playing ? "Pause all" : "Play all";
    for (const card of shownCards()) (playing ? play : pause)(card.element);
    if (!playing) cards.forEach((card) => pause(card.element));
  });
  find("restart").addEventListener("click", () => {
    for (const card of cards) for (const video of videos(card.element)) video.currentTime = 0;
  });
  arrange();
})();
