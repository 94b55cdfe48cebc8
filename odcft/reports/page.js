// Sorting, searching, paging and opening of clusters and images. File names are only ever set as text.
"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("data").textContent);
  const { clusters, images, neighbours } = data;
  if (!images) return;
  const encoded = element("thumbnails").textContent.split("\n");
  const PER_PAGE = 20, PER_OPENED = 120, FOUND = 120, EXAMPLES = 5;
  const count = images.name.length;
  const number = (value) => value.toLocaleString("en-US");
  const percent = (value) => `${Math.round(100 * value)}%`;

  // ---- small parts of the page

  function make(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function source(image) {
    if (encoded[image]) return `data:${data.media};base64,${encoded[image]}`;
    return data.folder && images.file ? images.file[image] && `${data.folder}/${images.file[image]}` : "";
  }

  function picture(image, large) {
    const button = make("button", large ? "picture large" : "picture");
    const name = images.name[image];
    button.type = "button";
    button.title = name;
    button.dataset.image = image;
    const from = source(image);
    if (from) {
      const img = make("img");
      img.src = from;
      img.alt = name;
      img.loading = "lazy";
      button.append(img);
    } else {
      button.append(make("span", "", name));
    }
    button.setAttribute("aria-label", images.label && images.label[image] ? `${name}, ${images.label[image]}` : name);
    return button;
  }

  function strip(title, list) {
    const box = make("div");
    box.append(make("p", "strip-name", title));
    const row = make("div", "strip");
    row.append(...list.map((image) => picture(image)));
    box.append(row);
    return box;
  }

  // ---- the gallery

  const members = clusters ? clusters.id.map(() => []) : [];
  if (clusters) for (let i = 0; i < count; i++) members[images.cluster[i]].push(i);
  for (const list of members) list.sort((a, b) => images.distance[a] - images.distance[b]);
  const rowOf = new Map(clusters ? clusters.id.map((id, k) => [id, k]) : []);
  const sorts = [
    ["size", "largest first", -1], ["size", "smallest first", 1],
    ["tightness", "tightest first", -1], ["tightness", "loosest first", 1],
    ["stability", "highest first", -1], ["stability", "lowest first", 1],
    ["purity", "purest first", -1], ["purity", "most mixed first", 1],
    ["id", "number", 1],
  ];

  function facts(k) {
    const said = [`${number(clusters.size[k])} ${clusters.size[k] === 1 ? "image" : "images"}`];
    for (const name of ["tightness", "stability", "purity"]) {
      const value = clusters[name] && clusters[name][k];
      if (value !== undefined && value !== null) said.push(`${clusters.names?.[name] ?? name} ${name === "purity" ? percent(value) : value.toFixed(2)}`);
    }
    return said;
  }

  function classesOf(k) {
    return clusters.classes ? clusters.classes[k].map(([name, share]) => `${name}: ${percent(share)}`).join(", ") : "";
  }

  function clusterRow(k) {
    const row = make("article", "row");
    const head = make("div", "row-head");
    const open = make("button", "", `Cluster ${clusters.id[k]}`);
    open.type = "button";
    open.dataset.cluster = k;
    head.append(open, ...facts(k).map((text) => make("span", "", text)));
    if (classesOf(k)) head.append(make("span", "", classesOf(k)));
    const strips = make("div", "strips");
    for (const [key, title] of [["near", "nearest"], ["random", "at random"], ["far", "farthest"]]) {
      if (clusters[key][k].length) strips.append(strip(title, clusters[key][k]));
    }
    row.append(head, strips);
    return row;
  }

  let order = [], page = 0;

  function sortClusters() {
    const [key, , sign] = sorts[Number(element("sort").value)];
    const values = clusters[key];
    const missing = (k) => values[k] === null;
    order = clusters.id.map((_, k) => k).sort((a, b) => missing(a) - missing(b) || sign * (values[a] - values[b]) || clusters.id[a] - clusters.id[b]);
  }

  function showPage() {
    const pages = Math.max(1, Math.ceil(order.length / PER_PAGE));
    page = Math.min(Math.max(0, page), pages - 1);
    element("rows").replaceChildren(...order.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(clusterRow));
    element("pages").hidden = pages === 1;
    element("page").value = page + 1;
    element("page").max = pages;
    element("page-count").textContent = `of ${number(pages)}`;
    element("previous").disabled = page === 0;
    element("next").disabled = page === pages - 1;
    element("count").textContent = `${number(order.length)} clusters`;
  }

  let lowered = null;

  function showFound(words) {
    lowered ??= images.name.map((name) => name.toLowerCase());
    const found = [];
    let total = 0;
    for (let i = 0; i < count; i++) {
      if (lowered[i].includes(words)) {
        total += 1;
        if (found.length < FOUND) found.push(i);
      }
    }
    const grid = make("div", "grid");
    grid.append(...found.map((image) => picture(image)));
    const hit = rowOf.get(Number(words));
    element("rows").replaceChildren(...(hit === undefined ? [] : [clusterRow(hit)]), grid);
    element("pages").hidden = true;
    const most = total > FOUND ? `; the first ${FOUND} are shown` : "";
    element("count").textContent = `${number(total)} of ${number(count)} listed images have this in their name${most}`;
  }

  function refresh() {
    const words = element("search").value.trim().toLowerCase();
    if (words) showFound(words);
    else showPage();
  }

  // ---- a cluster or an image, opened

  const dialog = element("opened");
  let trail = [];

  function show(entry) {
    element("opened-body").replaceChildren();
    if (entry.cluster !== undefined) showCluster(entry);
    else showImage(entry.image);
    element("back").hidden = trail.length < 2;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    element("opened-title").focus();
  }

  function open(entry) {
    trail.push(entry);
    show(entry);
  }

  function showCluster(entry) {
    const k = entry.cluster, from = entry.from ?? 0, list = members[k];
    element("opened-title").textContent = `Cluster ${clusters.id[k]}`;
    const said = [...facts(k), classesOf(k)].filter(Boolean).join(" · ");
    const grid = make("div", "grid");
    grid.append(...list.slice(from, from + PER_OPENED).map((image) => picture(image)));
    const paging = make("p", "paging");
    for (const [title, start, possible] of [["Nearer", from - PER_OPENED, from > 0], ["Farther", from + PER_OPENED, from + PER_OPENED < list.length]]) {
      if (!possible) continue;
      const button = make("button", "", title);
      button.type = "button";
      button.addEventListener("click", () => { entry.from = start; show(entry); });
      paging.append(button);
    }
    const unlisted = clusters.size[k] - list.length;
    const last = Math.min(from + PER_OPENED, list.length);
    const which = `Images ${number(from + 1)} to ${number(last)} of ${number(clusters.size[k])}, nearest to the centroid first` +
      (unlisted ? ` (${number(unlisted)} are not listed in this page)` : "");
    element("opened-body").append(make("p", "", said), make("p", "strip-name", which), grid, paging);
  }

  function side(title, list, image) {
    const box = make("div");
    box.append(make("h3", "", title));
    const row = make("div", "strip");
    for (const other of list) {
      const one = picture(other);
      if (images.label && images.label[image]) one.classList.add(images.label[other] === images.label[image] ? "same" : "other");
      row.append(one);
    }
    box.append(list.length ? row : make("p", "", "No other image of this page."));
    return box;
  }

  const position = new Map(neighbours ? neighbours.of.map((image, i) => [image, i]) : []);

  function sides(image) {
    if (data.mates) return data.mates.titles.map((title, i) => side(title, mates(i, image), image));
    const at = position.get(image);
    if (at === undefined) return [];
    const both = neighbours.before ? [side("Before", neighbours.before[at], image)] : [];
    return [...both, side("After", neighbours.after[at], image)];
  }

  // Two runs compared: the images that are nearest to the centroid of the cluster that each run put an image in.
  const known = [];
  function mates(run, image) {
    const cluster = run ? images.cluster : data.mates.cluster;
    if (!known[run]) {
      known[run] = new Map();
      for (let i = 0; i < count; i++) {
        if (!known[run].has(cluster[i])) known[run].set(cluster[i], []);
        known[run].get(cluster[i]).push(i);
      }
    }
    const list = known[run].get(cluster[image]).filter((other) => other !== image);
    return list.sort((a, b) => Boolean(encoded[b]) - Boolean(encoded[a])).slice(0, 16);
  }

  function showImage(image) {
    element("opened-title").textContent = images.name[image];
    const top = make("div", "opened-image");
    const words = make("div");
    const cluster = make("button", "", `Cluster ${clusters.id[images.cluster[image]]}`);
    cluster.type = "button";
    cluster.dataset.cluster = images.cluster[image];
    words.append(cluster);
    if (images.distance[image] !== null) words.append(make("p", "", `Distance to its centroid: ${images.distance[image].toFixed(3)}`));
    if (images.label && images.label[image]) words.append(make("p", "", `Label: ${images.label[image]}`));
    top.append(picture(image, true), words);
    const both = make("div", "sides example");
    both.append(...sides(image));
    element("opened-body").append(top);
    if (both.childElementCount) element("opened-body").append(make("h3", "", data.mates ? "Mates in the same cluster" : "Nearest neighbours in the sample"), both);
    else if (neighbours) element("opened-body").append(make("p", "", "The neighbours of this image are not known: it is not in the sample. odcft report --sample takes a larger one."));
  }

  function showExamples() {
    const list = data.examples.slice(firstExample, firstExample + EXAMPLES);
    element("examples").replaceChildren(...list.map((image) => {
      const row = make("div", "example");
      const own = make("div");
      own.append(make("p", "strip-name", "image"), picture(image));
      row.append(own, ...sides(image));
      return row;
    }));
  }

  let firstExample = 0;
  if (data.examples && element("examples")) {
    showExamples();
    element("other-examples").hidden = data.examples.length <= EXAMPLES;
    element("other-examples").addEventListener("click", () => {
      firstExample = firstExample + EXAMPLES < data.examples.length ? firstExample + EXAMPLES : 0;
      showExamples();
    });
  }

  // ---- what the reader does

  const numberOf = (link) => Number(link.getAttribute("xlink:href").replace("#cluster-", ""));

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-cluster], [data-image]");
    if (button) {
      open(button.dataset.cluster !== undefined ? { cluster: Number(button.dataset.cluster) } : { image: Number(button.dataset.image) });
      return;
    }
    const link = event.target.closest(".map a");
    if (link) {
      event.preventDefault();
      const k = rowOf.get(numberOf(link));
      if (k !== undefined) open({ cluster: k });
    }
  });
  addEventListener("beforeprint", () => { for (const img of document.images) img.loading = "eager"; });
  element("close").addEventListener("click", () => dialog.close());
  element("back").addEventListener("click", () => { trail.pop(); show(trail[trail.length - 1]); });
  dialog.addEventListener("close", () => { trail = []; });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  if (clusters && element("rows")) {
    sorts.forEach(([key, title], i) => {
      if (!clusters[key]) return;
      const choice = make("option", "", key === "id" ? "number" : `${clusters.names?.[key] ?? key}, ${title}`);
      choice.value = i;
      element("sort").append(choice);
    });
    let timer = 0;
    element("sort").addEventListener("change", () => { page = 0; element("search").value = ""; sortClusters(); showPage(); });
    element("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => { page = 0; refresh(); }, 120); });
    element("controls").addEventListener("submit", (event) => event.preventDefault());
    element("previous").addEventListener("click", () => { page -= 1; showPage(); });
    element("next").addEventListener("click", () => { page += 1; showPage(); });
    element("page").addEventListener("change", () => { page = Number(element("page").value) - 1 || 0; showPage(); });
    if (data.sort) element("sort").value = sorts.findIndex(([key, , sign]) => key === data.sort && sign === 1);
    sortClusters();
    showPage();
    document.addEventListener("pointerover", (event) => {  // titles of ten thousand points would slow the page down
      const link = event.target.closest(".map a"), k = link ? rowOf.get(numberOf(link)) : undefined;
      if (k === undefined || link.querySelector("title")) return;
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = `Cluster ${clusters.id[k]}, ${facts(k).join(", ")}`;
      link.append(title);
    });
  }
})();
